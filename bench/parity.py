"""Layout invariance: one seed and data give the same loss, gradient norm and expert loads on every layout of ranks.

`make parity` runs every layout below, with multi-token prediction off and on, prints a table and writes
bench/results/parity.json. `LAYOUTS` is also what the tests take their smaller set from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import write
from launch import forkserver, job, local
from moe_train.config.compose import compose
from moe_train.config.validate import validate

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
        local.start(cfg, layout)
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


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person."""
    shown = Table(
        title=f"Against one rank, tolerance {LOSS_TOLERANCE:g} loss and {GRAD_NORM_TOLERANCE:g} gradient norm"
    )
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
    parser.add_argument("--mtp", type=int, action="append", help="only these prediction depths (default: 0 and 1)")
    arguments = parser.parse_args()
    layouts, depths = arguments.layout or list(LAYOUTS), arguments.mtp or [0, 1]
    forkserver.begin()
    try:
        rows = run(layouts, arguments.steps, depths)
    finally:
        forkserver.kill()
    Console().print(table(rows))
    ok = all(row["holds"] for row in rows)
    if (arguments.layout, arguments.mtp, arguments.steps) == (None, None, 20):
        worst = {key: max(row[key] for row in rows) for key in rows[0] if key.startswith("max_")}
        print(f"wrote {write('parity', {'all_hold': ok, 'steps': arguments.steps, **worst}, rows)}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
