"""How far training in emulated FP8 strays from bf16: the same model, data and seed in each precision, on this CPU.

The measure is that of DeepSeek-V3 (arXiv 2412.19437, appendix B.1): the relative difference of losses that an
exponential moving average with a coefficient of 0.9 has smoothed. There it stays below 0.25 % with tiles of 1 x 128 and
128 x 128. Here it counts from the end of the warm-up on, at every step. The case fp32 is the noise: what rounding to
bf16 alone does to a run.

`make bench-fp8` prints one table, writes bench/results/fp8_loss.json with every loss of every run, and draws
docs/fp8_loss.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from bench.losses import SMOOTHING, differences, smoothed
from bench.results import write
from launch import job
from launch.local import forkserver, launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.files import atomic

BASELINE = "bf16"
# One pass a step on one rank, so that weights are rounded once; the last case has two on each of two stages.
CASES: dict[str, list[str]] = {
    "bf16": ["precision=bf16"],
    "fp32": ["precision=fp32"],
    "fp8_block": ["precision=fp8_block"],
    "fp8_tensor": ["precision=fp8_tensor"],
    "fp8_delayed": ["precision=fp8_delayed"],
    "fp8_block, pp2, recompute": [
        "precision=fp8_block", "recompute=deepseek_v3", "parallel.pp=2",
    ],
}  # fmt: skip
SEEDS = (1234, 1, 2)
ONE_SEED = ("fp32", "fp8_tensor", "fp8_delayed", "fp8_block, pp2, recompute")  # reported too, with the first seed
BATCH = 32  # sequences; with fewer the losses of one run jump about by as much as the criterion allows
WARM_UP_STEPS = 20
LARGEST_DIFFERENCE = 0.0025  # of fp8_block
PICTURE = Path(__file__).parent.parent / "docs" / "fp8_loss.svg"
COMMON = [
    "model=tiny",
    "runtime=cpu",
    "train.seq_length=128",
    "train.eval_batches=0",
    f"schedule.warmup_steps={WARM_UP_STEPS}",
    "checkpoint.save_at_end=false",
    "telemetry.tensorboard=false",
    "telemetry.progress=false",
    "launcher.threads_per_rank=1",  # sums in one order, on any machine
]


def losses(case: str, seed: int, steps: int, batch: int) -> list[float]:
    """Training loss of each step, nats a token. A pipeline gets two micro-batches, one rank gets one."""
    with tempfile.TemporaryDirectory(prefix="bench-fp8-") as directory:
        run = [f"seed={seed}", f"train.steps={steps}", f"run_dir={directory}/run"]
        run += [f"batch.global_batch_size={batch}", f"batch.micro_batch_size={batch // (2 if 'pp2' in case else 1)}"]
        cfg = compose([*COMMON, *CASES[case], *run])
        layout = validate(cfg)
        job.prepare_data(cfg)
        launcher.start(cfg, layout)
        lines = map(json.loads, Path(directory, "run", "metrics.jsonl").read_text().splitlines())
        return [line["lm_loss"] for line in lines if "lm_loss" in line]


def kept_losses(case: str, seed: int, steps: int, batch: int, keep: Path | None) -> list[float]:
    """`losses`, from the file that an earlier bench left in `keep`, if it did."""
    if keep is None:
        return losses(case, seed, steps, batch)
    file = keep / f"{case.replace(', ', '-')}-{seed}-{steps}-{batch}.json"
    if not file.exists():
        keep.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, json.dumps(losses(case, seed, steps, batch)))
    curve: list[float] = json.loads(file.read_text())
    return curve


def row(case: str, seed: int, curve: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """One run against the baseline of its seed."""
    relative = differences(curve, baseline, WARM_UP_STEPS)
    return {
        "case": case,
        "seed": seed,
        "last_smoothed_loss": smoothed(curve)[-1],
        "last_difference": relative[-1],
        "largest_difference": max((abs(d) for d in relative), key=lambda d: (math.isnan(d), d)),
        "mean_difference": sum(map(abs, relative)) / len(relative),
        "losses": list(curve),
    }


def measure(
    cases: Sequence[str], seeds: Sequence[int], steps: int, batch: int, keep: Path | None
) -> list[dict[str, Any]]:
    """A row for each run, the baseline's first; cases of ONE_SEED with the first seed alone."""
    rows = []
    for seed in seeds:
        baseline = kept_losses(BASELINE, seed, steps, batch, keep)
        rows.append(row(BASELINE, seed, baseline, baseline))
        for case in cases:
            if case in ONE_SEED and seed != seeds[0]:
                continue
            rows.append(row(case, seed, kept_losses(case, seed, steps, batch, keep), baseline))
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of each case over all seeds, and whether that of fp8_block is small enough."""
    summary: dict[str, Any] = {}
    for r in rows:
        name = f"{r['case'].replace(', ', '_')}_largest_difference"
        if r["case"] != BASELINE:
            summary[name] = max(summary.get(name, 0.0), r["largest_difference"], key=lambda d: (math.isnan(d), d))
    block = summary.get("fp8_block_largest_difference")
    return {
        "fp8_block_holds": None if block is None else block < LARGEST_DIFFERENCE,
        "every_loss_finite": all(math.isfinite(loss) for r in rows for loss in r["losses"]),
        **summary,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person."""
    shown = Table(title=f"Smoothed loss against {BASELINE}, from step {WARM_UP_STEPS + 1} on")
    for column in ("case", "seed", "last loss", "last difference", "mean", "largest"):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for r in rows:
        percentages = [
            f"{100 * r[name]:.3f} %" for name in ("last_difference", "mean_difference", "largest_difference")
        ]
        shown.add_row(r["case"], str(r["seed"]), f"{r['last_smoothed_loss']:.4f}", *percentages)
    return shown


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Two charts in one SVG for the first seed: the smoothed losses, and their differences from the baseline."""
    # Text stays text, and the same numbers make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
        figure, (losses_, differences_) = plt.subplots(2, figsize=(8, 7), layout="constrained")
        curves = {r["case"]: r["losses"] for r in rows if r["seed"] == rows[0]["seed"]}
        steps = range(1, len(curves[BASELINE]) + 1)
        for case, curve in curves.items():
            losses_.plot(steps, smoothed(curve), label=case)
            percent = [100 * d for d in differences(curve, curves[BASELINE], WARM_UP_STEPS)]
            differences_.plot(steps[WARM_UP_STEPS:], percent, label=case)
        for limit in (-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE):
            differences_.axhline(100 * limit, color="grey", linestyle="--")
        losses_.set(ylabel="smoothed training loss, nats a token", xlabel="step")
        differences_.set(ylabel=f"difference from {BASELINE}, %", xlabel="step")
        losses_.legend()
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Command line of `make bench-fp8`. Exits with 1 if fp8_block is too far from bf16 or a loss is not a number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"more than the {WARM_UP_STEPS} of the warm-up")
    parser.add_argument("--seed", type=int, action="append", help=f"repeat for more (default: {SEEDS})")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences of a step")
    parser.add_argument("--case", action="append", choices=[c for c in CASES if c != BASELINE], help="repeat for more")
    parser.add_argument("--keep", type=Path, help="directory of finished curves, which are not measured again")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps={options.steps} is all warm-up; use --steps={WARM_UP_STEPS + 1} or more")
    seeds = options.seed or list(SEEDS)
    forkserver.begin()
    try:
        cases = options.case or [case for case in CASES if case != BASELINE]
        rows = measure(cases, seeds, options.steps, options.batch, options.keep)
    finally:
        forkserver.kill()
    summary = summarise(rows)
    Console().print(table(rows))
    if (options.steps, options.seed, options.case) == (300, None, None):
        facts = {
            "steps": options.steps,
            "batch_sequences": options.batch,
            "seeds": seeds,
            "smoothing": SMOOTHING,
            "criterion": LARGEST_DIFFERENCE,
        }
        name = "fp8_loss" if options.batch == BATCH else f"fp8_loss_batch_{options.batch}"
        print(f"wrote {write(name, {**summary, **facts}, rows)}")
        if options.batch == BATCH:
            draw(rows, PICTURE)
            print(f"wrote {PICTURE}")
    sys.exit(0 if summary["fp8_block_holds"] is not False and summary["every_loss_finite"] else 1)


if __name__ == "__main__":
    main()
