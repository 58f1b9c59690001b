"""Our training step compared with that of Hugging Face transformers, on this machine's CPU, in fp32 and in bf16.

Both train the same DeepSeek-V3-shaped models (`model=tiny` without what transformers does not train with, and one of
63 M parameters), from the same weights, on the same tokens, with the same AdamW and clipping. transformers runs with
both of its implementations of experts. In bf16 it keeps weights and moments in bf16, its fastest way; ours keep fp32
master weights. Each side has its own process; they take turns, a few steps each. Losses must agree, or the comparison
fails.

`make bench-step` prints one table, and where the time of both sides goes, and writes bench/results/step.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import step_data, step_profile, step_transformers
from bench.results import write
from bench.step_data import StepTask
from bench.step_workers import OURS, prepare
from bench.workers import Worker
from moe_train.model.arithmetic import flops_per_token
from parallel.errors import MoeTrainError

THEIRS = ("eager", "grouped_mm")
WARM_UP_STEPS, TURN_STEPS = 3, 2
# Relative, over the first steps, and for later ones ten times as much. Rounding decides which of two nearly equal
# experts gets a token, and such differences grow: in fp32 the two variants of transformers, which differ in the order
# of sums only, are up to 7e-5 apart after 16 steps of the larger model. In bf16 the sides round at other places.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
FIRST_STEPS, LATER = 10, 10


Profile = tuple[list[dict[str, Any]], list[dict[str, Any]]]
Found = tuple[list[dict[str, Any]], dict[str, Profile], list[dict[str, Any]]]


def measure(task: StepTask, rounds: int) -> Found:
    """One row for each side; profiles of ours and of the faster of theirs (parts of the model, operations); our grouped
    GEMMs and torch's."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as directory:
        weights = Path(directory, "weights.pt")
        workers: dict[str, Worker] = {}
        try:
            for side in (OURS, *THEIRS):  # ours writes the weights that the others read
                workers[side] = Worker(prepare, side, task, weights)
                workers[side].ask("steps", 0)
            steps = {side: worker.ask("steps", WARM_UP_STEPS) for side, worker in workers.items()}
            peaks = []
            for _ in range(rounds):
                peaks.append(workers[OURS].ask("gemm"))
                for side, worker in workers.items():
                    steps[side] += worker.ask("steps", TURN_STEPS)
            faster = min(THEIRS, key=lambda side: statistics.median(time for _, time in steps[side][WARM_UP_STEPS:]))
            # Not the slower one: the profiler's events fragment the heap. 64 experts in separate GEMMs then take 19 GB.
            profiles = {side: workers[side].ask("profile", TURN_STEPS) for side in (OURS, faster)}
            grouped = workers[OURS].ask("grouped")
        finally:
            for worker in workers.values():
                worker.stop()
    reference = [loss for loss, _ in steps[OURS]]
    rows = [
        row(side, task, steps_of_side, reference, statistics.median(peaks)) for side, steps_of_side in steps.items()
    ]
    return rows, profiles, grouped


def row(
    side: str, task: StepTask, steps: Sequence[tuple[float, float]], reference: Sequence[float], peak_tflops: float
) -> dict[str, Any]:
    """Speed of one side from (loss, seconds) of its steps, and how far its losses are from `reference`."""
    seconds = sorted(time for _, time in steps[WARM_UP_STEPS:])
    median = statistics.median(seconds)
    quarter = len(seconds) // 4
    model = task.config().model
    apart = [abs(loss - ours) / ours for (loss, _), ours in zip(steps, reference, strict=True)]
    tflops = task.tokens * flops_per_token(model, task.seq_length) / median / 1e12
    return {
        "model": task.model,
        "side": side,
        "precision": task.dtype,
        "tokens_per_s": task.tokens / median,
        "step_ms": median * 1e3,
        "fastest_step_ms": seconds[0] * 1e3,
        "spread": (seconds[-1 - quarter] - seconds[quarter]) / median,
        "tflops": tflops,
        "gemm_peak_tflops": peak_tflops,
        "fraction_of_gemm_peak": tflops / peak_tflops,
        "last_loss": steps[-1][0],
        "first_relative_loss_difference": max(apart[:FIRST_STEPS]),
        "max_relative_loss_difference": max(apart),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours over the faster variant of transformers, by precision: the lowest of all models, then each model's."""
    ratios: dict[str, dict[str, float]] = {}
    for dtype in ("bf16", "fp32"):
        for model in dict.fromkeys(r["model"] for r in rows if r["precision"] == dtype):
            rows_of_model = [r for r in rows if r["precision"] == dtype and r["model"] == model]
            speeds = {r["side"]: r["tokens_per_s"] for r in rows_of_model}
            ours = speeds.pop(OURS)
            ratios.setdefault(dtype, {})[model] = ours / max(speeds.values())
    summary: dict[str, Any] = {f"ratio_{dtype}": min(by_model.values()) for dtype, by_model in ratios.items()}
    for dtype, by_model in ratios.items():
        summary |= {f"ratio_{dtype}_{model}": ratio for model, ratio in by_model.items()}
    summary["fraction_of_gemm_peak"] = min(r["fraction_of_gemm_peak"] for r in rows if r["side"] == OURS)
    summary["losses_agree"] = all(map(_agrees, rows))
    return summary


def _agrees(row: dict[str, Any]) -> bool:
    tolerance = LOSS_TOLERANCE[row["precision"]]
    return bool(
        row["first_relative_loss_difference"] <= tolerance and row["max_relative_loss_difference"] <= LATER * tolerance
    )


def table(rows: Sequence[dict[str, Any]], threads: int) -> Table:
    """The rows for a person."""
    shown = Table(title=f"Training steps, {threads} threads")
    for column in ("model", "", "precision", "tokens/s", "step, ms", "fastest", "spread", "of GEMM peak", "loss diff."):
        shown.add_column(column, justify="left" if column in ("model", "", "precision") else "right")
    for r in rows:
        shown.add_row(
            r["model"],
            r["side"] if r["side"] == OURS else f"transformers, {r['side']}",
            r["precision"],
            f"{r['tokens_per_s']:,.0f}",
            f"{r['step_ms']:.0f}",
            f"{r['fastest_step_ms']:.0f}",
            f"{r['spread']:.0%}",
            f"{r['fraction_of_gemm_peak']:.0%}",
            f"{r['max_relative_loss_difference']:.1e}",
        )
    return shown


def profile_table(task: StepTask, profiles: dict[str, Profile]) -> Table:
    """Milliseconds of a step of each side, by part of the model; they add up to the step under the profiler."""
    shown = Table(title=f"Where the time goes, ms: {task.model}, {task.dtype} (the profiler slows all sides down)")
    shown.add_column("part")
    for side in profiles:
        shown.add_column(side if side == OURS else f"transformers, {side}", justify="right")
    parts = {side: {part["part"]: part["ms"] for part in profile} for side, (profile, _) in profiles.items()}
    for part in sorted(step_profile.PARTS, key=lambda name: -parts[OURS].get(name, 0)):
        shown.add_row(part, *(f"{ms.get(part, 0):.1f}" for ms in parts.values()))
    shown.add_row("step", *(f"{sum(ms.values()):.1f}" for ms in parts.values()), style="bold")
    return shown


def operations_table(task: StepTask, profiles: dict[str, Profile], count: int = 10) -> Table:
    """The operations of our step that take most time in themselves."""
    shown = Table(title=f"Our operations, time in themselves: {task.model}, {task.dtype}")
    for column in ("operation", "calls", "ms"):
        shown.add_column(column, justify="left" if column == "operation" else "right")
    for operation in profiles[OURS][1][:count]:
        shown.add_row(operation["operation"], f"{operation['calls']:.0f}", f"{operation['ms']:.1f}")
    return shown


def grouped_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Grouped GEMMs, ours and torch's."""
    shown = Table(title="Grouped GEMMs of the experts' first layer, with new counts in every call")
    for column in ("precision", "experts", "tokens", "product", "ours, ms", "torch._grouped_mm, ms", "torch / ours"):
        shown.add_column(column, justify="left" if column in ("precision", "product") else "right")
    for r in rows:
        numbers = (f"{r['ours_ms']:.2f}", f"{r['torch_ms']:.2f}", f"{r['torch_over_ours']:.2f}")
        shown.add_row(r["precision"], str(r["experts"]), f"{r['tokens']:,}", r["product"], *numbers)
    return shown


def main() -> None:
    """Command line of `make bench-step`. Exits with 1 if the losses disagree, or transformers is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help=f"turns of {TURN_STEPS} steps for each side")
    parser.add_argument("--precision", action="append", choices=LOSS_TOLERANCE, help="only this one")
    parser.add_argument("--model", action="append", choices=step_data.MODELS, help="only this one")
    parser.add_argument("--sequences", type=int, help="in a step; 8 for tiny, 4 for 60m")
    parser.add_argument("--seq-length", type=int, help="tokens; 256 for tiny, 512 for 60m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="of our config, such as backend.grouped_gemm=false")
    options = parser.parse_args()
    try:
        version = step_transformers.require()
    except MoeTrainError as error:
        sys.exit(f"error: {error}")
    rows: list[dict[str, Any]] = []
    grouped: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 140)
    for model in options.model or step_data.MODELS:
        sequences, seq_length = step_data.SHAPES[model]
        for dtype in options.precision or ["fp32", "bf16"]:
            shape = options.sequences or sequences, options.seq_length or seq_length
            task = StepTask(dtype, *shape, options.threads, model, tuple(options.overrides))
            rows_of_task, profiles, gemms = measure(task, options.rounds)
            rows += rows_of_task
            grouped += gemms
            for side, (parts, _) in profiles.items():
                shares.append({"model": model, "precision": dtype, "side": side, "parts": parts})
            console.print(profile_table(task, profiles), operations_table(task, profiles))
    summary = summarise(rows)
    console.print(grouped_table(grouped), table(rows, options.threads))
    for name, value in summary.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if sys.argv[1:] == []:
        about = {"loss_tolerance": LOSS_TOLERANCE, "transformers": version, "profile": shares, "grouped": grouped}
        print(f"wrote {write('step', {**summary, **about}, rows)}")
    sys.exit(0 if summary["losses_agree"] else 1)


if __name__ == "__main__":
    main()
