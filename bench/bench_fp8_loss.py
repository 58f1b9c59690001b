"""How far training in emulated FP8 strays from bf16: the same model, data and seed in each precision, on this CPU.

The measure is that of DeepSeek-V3 (arXiv 2412.19437, appendix B.1): the relative difference of losses that an
exponential moving average with a coefficient of 0.9 has smoothed. There it stays below 0.25 % with tiles of 1 x 128 and
128 x 128.
Here it counts from the end of the warm-up on, at every step.

`make bench-fp8` prints one table and writes bench/results/fp8_loss.json, with every loss of every run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import write
from launch import forkserver, job, local
from moe_train.config.compose import compose
from moe_train.config.validate import validate

BASELINE = "bf16"
PRECISIONS = ("fp8_block", "fp8_tensor", "fp8_delayed")
SMOOTHING = 0.9
WARM_UP_STEPS = 20
LARGEST_DIFFERENCE = 0.0025  # of fp8_block
# One pass a step, so that weights are rounded once.
COMMON = [
    "model=tiny",
    "runtime=cpu",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=8",
    "train.seq_length=128",
    "train.eval_batches=0",
    f"schedule.warmup_steps={WARM_UP_STEPS}",
    "checkpoint.save_at_end=false",
    "telemetry.tensorboard=false",
    "telemetry.progress=false",
]


def losses(precision: str, seed: int, steps: int, overrides: Sequence[str]) -> list[float]:
    """Training loss of each step, nats a token."""
    with tempfile.TemporaryDirectory(prefix="bench-fp8-") as directory:
        run = [f"precision={precision}", f"seed={seed}", f"train.steps={steps}", f"run_dir={directory}/run"]
        cfg = compose([*COMMON, *run, *overrides])
        layout = validate(cfg)
        job.prepare_data(cfg)
        local.start(cfg, layout)
        lines = map(json.loads, Path(directory, "run", "metrics.jsonl").read_text().splitlines())
        return [line["lm_loss"] for line in lines if "lm_loss" in line]


def smoothed(curve: Sequence[float]) -> list[float]:
    """Exponential moving average that starts at the first loss."""
    result = [curve[0]]
    for loss in curve[1:]:
        result.append(SMOOTHING * result[-1] + (1 - SMOOTHING) * loss)
    return result


def row(precision: str, seed: int, curve: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """One run against the baseline of its seed."""
    pairs = zip(smoothed(curve), smoothed(baseline), strict=True)
    differences = [(ours - theirs) / theirs for ours, theirs in pairs][WARM_UP_STEPS:]
    return {
        "precision": precision,
        "seed": seed,
        "last_smoothed_loss": smoothed(curve)[-1],
        "last_difference": differences[-1],
        "largest_difference": max(map(abs, differences)),
        "mean_difference": sum(map(abs, differences)) / len(differences),
        "losses": list(curve),
    }


def measure(
    precisions: Sequence[str], seeds: Sequence[int], steps: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each run, the baseline's first."""
    rows = []
    for seed in seeds:
        baseline = losses(BASELINE, seed, steps, overrides)
        rows.append(row(BASELINE, seed, baseline, baseline))
        for precision in precisions:
            rows.append(row(precision, seed, losses(precision, seed, steps, overrides), baseline))
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of each precision over all seeds, and whether that of fp8_block is small enough."""
    summary: dict[str, Any] = {}
    for r in rows:
        name = f"{r['precision']}_largest_difference"
        if r["precision"] != BASELINE:
            summary[name] = max(summary.get(name, 0.0), r["largest_difference"])
    block = summary.get("fp8_block_largest_difference")
    return {**summary, "fp8_block_holds": None if block is None else block < LARGEST_DIFFERENCE}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person."""
    shown = Table(title=f"Smoothed loss against {BASELINE}, from step {WARM_UP_STEPS + 1} on")
    for column in ("precision", "seed", "last loss", "last difference", "mean", "largest"):
        shown.add_column(column, justify="left" if column == "precision" else "right")
    for r in rows:
        differences = [
            f"{100 * r[name]:.3f} %" for name in ("last_difference", "mean_difference", "largest_difference")
        ]
        shown.add_row(r["precision"], str(r["seed"]), f"{r['last_smoothed_loss']:.4f}", *differences)
    return shown


def main() -> None:
    """Command line of `make bench-fp8`. Exits with 1 if fp8_block is too far from bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"more than the {WARM_UP_STEPS} of the warm-up")
    parser.add_argument("--seed", type=int, action="append", help="repeat for more runs (default: 1234)")
    parser.add_argument("--precision", action="append", help="only this one against bf16 (repeat the option)")
    parser.add_argument("overrides", nargs="*", help="of the config, such as model.mtp_num_layers=0")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps={options.steps} is all warm-up; use --steps={WARM_UP_STEPS + 1} or more")
    seeds = options.seed or [1234]
    forkserver.begin()
    try:
        rows = measure(options.precision or PRECISIONS, seeds, options.steps, options.overrides)
    finally:
        forkserver.kill()
    summary = summarise(rows)
    Console().print(table(rows))
    if sys.argv[1:] == []:
        facts = {"steps": options.steps, "seeds": seeds, "smoothing": SMOOTHING, "criterion": LARGEST_DIFFERENCE}
        print(f"wrote {write('fp8_loss', {**summary, **facts}, rows)}")
    sys.exit(1 if summary["fp8_block_holds"] is False else 0)


if __name__ == "__main__":
    main()
