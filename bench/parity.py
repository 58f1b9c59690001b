"""Layout invariance: one seed and data give the same loss, gradient norm and expert loads on every layout of ranks.

`make parity` runs every layout below, with multi-token prediction off and on, and every division of the batch, prints a
table and writes bench/results/parity.json. The tests take their smaller sets from `LAYOUTS` and `DIVISIONS`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import write
from launch import job
from launch.local import forkserver, launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate

LOSS_TOLERANCE = 1e-4
GRAD_NORM_TOLERANCE = 1e-3
LOSSES = {"lm_loss", "mtp_loss"}

LAYOUTS: dict[str, list[str]] = {
    "dp2": ["parallel.dp=2"],
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "pp2 vpp2": ["parallel.pp=2", "parallel.vpp=2"],
    "ep2": ["parallel.ep=2"],
    "cp2": ["parallel.cp=2"],
    "tp2 ep2": ["parallel.tp=2", "parallel.ep=2"],
    "tp2 etp2": ["parallel.tp=2", "parallel.etp=2"],
    "tp2 etp2 ep2": ["parallel.tp=2", "parallel.etp=2", "parallel.ep=2"],
    "pp2 ep2": ["parallel.pp=2", "parallel.ep=2"],
    "tp2 pp2 ep2": ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"],
    "tp2 pp2 ep2 dp2": ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.dp=2"],
    "ep4": ["parallel.ep=4"],
    "dp2, optimizer not distributed": ["parallel.dp=2", "parallel.distributed_optimizer=false"],
    "ep2, optimizer not distributed": ["parallel.ep=2", "parallel.distributed_optimizer=false"],
    "ep2, allgather": ["parallel.ep=2", "parallel.dispatcher=allgather"],
    "tp2 ep2, allgather": ["parallel.tp=2", "parallel.ep=2", "parallel.dispatcher=allgather"],
    "tp2 ep2, experts one by one": ["parallel.tp=2", "parallel.ep=2", "backend.grouped_gemm=false"],
    "dp2 ep2, overlapped": ["parallel.ep=2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
}


@dataclass(frozen=True)
class Division:
    """The same global batch in two divisions into micro-batches, with an auxiliary loss large enough to be seen."""

    loss: list[str]
    one: list[str]
    other: list[str]


def _balance(*losses: str, z_loss: float = 0.0) -> list[str]:
    coefficients = ",".join("1.0" for _ in losses)
    return [
        f"model.balance_losses=[{','.join(losses)}]", f"model.balance_loss_coeffs=[{coefficients}]",
        f"model.z_loss_coeff={z_loss}", "model.mtp_num_layers=0",
    ]  # fmt: skip


def _micro_batches(size: int) -> str:
    return f"batch.micro_batch_size={size}"


# By definition `aux_loss` sees the micro-batch of a rank, and `global_aux_loss` those of all data-parallel ranks. The
# divisions of these two differ only in what that leaves open (docs/metrics.md).
DIVISIONS = {
    "seq_aux_loss, 2 sequences": Division(_balance("seq_aux_loss"), [], [_micro_batches(2)]),
    "seq_aux_loss, 4 sequences": Division(_balance("seq_aux_loss"), [], [_micro_batches(4)]),
    "seq_aux_loss, 4 sequences, dp2": Division(_balance("seq_aux_loss"), [], [_micro_batches(4), "parallel.dp=2"]),
    "aux_loss, 2 sequences, dp2": Division(
        _balance("aux_loss"), [_micro_batches(2)], [_micro_batches(2), "parallel.dp=2"]
    ),
    "global_aux_loss, dp2": Division(_balance("global_aux_loss"), [_micro_batches(2)], ["parallel.dp=2"]),
    "global_aux_loss, 2 sequences, dp2": Division(
        _balance("global_aux_loss"), [_micro_batches(4)], [_micro_batches(2), "parallel.dp=2"]
    ),
    "z_loss, 2 sequences": Division(_balance(z_loss=0.1), [], [_micro_batches(2)]),
    "z_loss, 4 sequences, dp2": Division(_balance(z_loss=0.1), [], [_micro_batches(4), "parallel.dp=2"]),
    "expert bias alone, 4 sequences": Division(_balance(), [], [_micro_batches(4)]),
    "multi-token prediction, 4 sequences": Division(["model.mtp_num_layers=2"], [], [_micro_batches(4)]),
}
COMMON = [
    "model=tiny",
    "precision=fp32",
    "runtime=cpu",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=1",
    "train.seq_length=64",
    "train.eval_batches=0",
    "schedule.warmup_steps=5",
    "checkpoint.save_at_end=false",
    "telemetry.tensorboard=false",
    "telemetry.progress=false",
    "launcher.threads_per_rank=1",
]


def measure(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train as `moe-train` would, on ranks of this machine, and return the lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        cfg = compose([*COMMON, *overrides, f"run_dir={directory}/run"])
        layout = validate(cfg)
        job.prepare_data(cfg)
        launcher.start(cfg, layout)
        lines = Path(directory, "run", "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "lm_loss" in line]


def compare(reference: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest relative differences over all steps, and whether step 1 sent equally many tokens to each expert."""
    pairs = list(zip(reference, other, strict=True))

    def worst(key: str) -> float:
        differences = [abs(a[key] - b[key]) / abs(a[key]) for a, b in pairs]
        return max(differences, key=lambda x: (math.isnan(x), x))  # `max` alone passes over a NaN

    return {
        "steps": len(pairs),
        "max_relative_loss_difference": max(map(worst, LOSSES & reference[0].keys()), key=lambda x: (math.isnan(x), x)),
        "max_relative_grad_norm_difference": worst("grad_norm"),
        "same_expert_load_at_step_1": reference[0].get("expert_load") == other[0].get("expert_load"),
    }


def holds(row: dict[str, Any]) -> bool:
    """Whether a row of `compare` is within the tolerances."""
    return (
        row["max_relative_loss_difference"] <= LOSS_TOLERANCE
        and row["max_relative_grad_norm_difference"] <= GRAD_NORM_TOLERANCE
        and row["same_expert_load_at_step_1"]
    )


def run(layouts: Sequence[str], steps: int, mtp_depths: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each layout and prediction depth, against the single rank."""
    rows = []
    console = Console(stderr=True)
    for depth in mtp_depths:
        common = [f"train.steps={steps}", f"model.mtp_num_layers={depth}"]
        reference = measure(common)
        for name in layouts:
            start = time.monotonic()
            row = {"layout": name, "mtp": depth, **compare(reference, measure([*common, *LAYOUTS[name]]))}
            row["holds"] = holds(row)
            rows.append(row)
            console.print(
                f"{name}, mtp {depth}: {'holds' if row['holds'] else 'FAILS'} ({time.monotonic() - start:.0f} s)"
            )
    return rows


def run_divisions(names: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """One row for each division of the batch, against the other division of it."""
    rows = []
    for name in names:
        case = DIVISIONS[name]
        common = [f"train.steps={steps}", *case.loss]
        row = {
            "layout": name,
            "mtp": int("multi" in name),
            **compare(measure([*common, *case.one]), measure([*common, *case.other])),
        }
        rows.append(row | {"holds": holds(row)})
        Console(stderr=True).print(f"{name}: {'holds' if rows[-1]['holds'] else 'FAILS'}")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person."""
    tolerances = f"tolerance {LOSS_TOLERANCE:g} loss and {GRAD_NORM_TOLERANCE:g} gradient norm"
    shown = Table(title=f"Against one rank, or another division of the batch; {tolerances}")
    for column in ("layout", "MTP", "loss", "gradient norm", "expert load", "holds"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(
            row["layout"],
            "on" if row["mtp"] else "off",
            f"{row['max_relative_loss_difference']:.1e}",
            f"{row['max_relative_grad_norm_difference']:.1e}",
            "same" if row["same_expert_load_at_step_1"] else "DIFFERS",
            "yes" if row["holds"] else "NO",
        )
    return shown


def main() -> None:
    """Command line of `make parity`. Exits with 1 if any layout differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only these layouts (repeat the option)")
    parser.add_argument("--division", action="append", choices=DIVISIONS, help="only these divisions of the batch")
    parser.add_argument("--mtp", type=int, action="append", help="only these prediction depths (default: 0 and 1)")
    arguments = parser.parse_args()
    everything = arguments.layout is None and arguments.division is None
    layouts = list(LAYOUTS) if everything else arguments.layout or []
    divisions = list(DIVISIONS) if everything else arguments.division or []
    depths = arguments.mtp or [0, 1]
    forkserver.begin()
    try:
        rows = run(layouts, arguments.steps, depths) if layouts else []
        rows += run_divisions(divisions, arguments.steps)
    finally:
        forkserver.kill()
    Console().print(table(rows))
    ok = all(row["holds"] for row in rows)
    if everything and (arguments.mtp, arguments.steps) == (None, 20):
        worst = {key: max(row[key] for row in rows) for key in rows[0] if key.startswith("max_")}
        print(f"wrote {write('parity', {'all_hold': ok, 'steps': arguments.steps, **worst}, rows)}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
