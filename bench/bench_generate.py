"""Generation by our engine compared with that of Hugging Face transformers, on this machine's CPU, in fp32 and in bf16.

Both load the same checkpoint (`model=tiny` without multi-token prediction, and one of 63 M parameters) and continue the
same random prompts greedily, transformers with its own cache and both of its implementations of experts. Each side has
its own process; they take turns. In fp32 the tokens must be the same, or the comparison fails. Of 8 prompts of 8,192
tokens transformers computes only the first, and decodes with 8 copies of its cache.

`make bench-generate` prints one table, and where the time of our decode step goes, and writes
bench/results/generate.json.
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
from bench.generate_sides import OURS, GenerateTask, Timing, prepare, write_checkpoint
from bench.results import read, write
from bench.workers import Worker
from parallel.errors import MoeTrainError

THEIRS = ("eager", "grouped_mm")
NEW_TOKENS = {512: 24, 8192: 24}
"""Generated after a prompt of this many tokens. The first sequences have some before the last one has its first."""
MIN_STEPS = 8
"""Steps of a generation in which every sequence gets a token."""
ROUNDS = {512: 5, 8192: 2}
"""Generations of each side after a prompt of this many tokens."""
BATCHES = (1, 8)
MIN_AGREEMENT = {"fp32": 1.0, "bf16": 0.0}
"""Share of the prompts whose tokens are to be the same. In bf16 the sides round at other places, and the first
difference changes all tokens after it."""


def measure(
    task: GenerateTask, shapes: Sequence[tuple[int, int]], rounds: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for each side and (context, batch); and profiles of our decode steps."""
    with tempfile.TemporaryDirectory(prefix="bench-generate-") as directory:
        writer = Worker(_writer, task, Path(directory))
        writer.ask("write")
        writer.stop()
        workers: dict[str, Worker] = {}
        try:
            workers |= {side: Worker(prepare, side, task, Path(directory)) for side in (OURS, *THEIRS)}
            rows, profiles = [], []
            for context, batch in shapes:
                new = NEW_TOKENS[context]
                for worker in workers.values():  # warm up
                    worker.ask("generate", batch, min(context, 512), 4, 1_000)
                timings: dict[str, list[Timing]] = {side: [] for side in workers}
                for seed in range(rounds or ROUNDS[context]):
                    for side, worker in workers.items():
                        timings[side].append(worker.ask("generate", batch, context, new, seed))
                rows += [row(side, task, context, batch, own, timings[OURS]) for side, own in timings.items()]
                parts, operations = workers[OURS].ask("profile", batch, context, 4)
                profiles.append({
                    "model": task.model, "precision": task.dtype, "context": context, "batch": batch, "parts": parts,
                    "operations": operations[:10],
                })  # fmt: skip
        finally:
            for worker in workers.values():
                worker.stop()
    return rows, profiles


def _writer(task: GenerateTask, directory: Path) -> dict[str, Any]:
    return {"write": lambda: write_checkpoint(task, directory)}


def row(
    side: str, task: GenerateTask, context: int, batch: int, timings: Sequence[Timing], reference: Sequence[Timing]
) -> dict[str, Any]:
    """Speeds of one side, medians of its generations, and how many of its texts are those of `reference`."""
    if min(timing.steps for timing in timings) < MIN_STEPS:
        raise RuntimeError(f"fewer than {MIN_STEPS} steps of {side} were measured")
    step = statistics.median(timing.decode_s / timing.steps for timing in timings)
    prefills = [timing.prefill_s for timing in timings if timing.prefill_s is not None]
    prefill = statistics.median(prefills) if prefills else None
    # Of copies of one prompt, the first is compared.
    texts = [
        pair
        for t, r in zip(timings, reference, strict=True)
        for pair in zip(t.tokens, r.tokens[: len(t.tokens)], strict=True)
    ]
    return {
        "model": task.model,
        "precision": task.dtype,
        "context": context,
        "batch": batch,
        "side": side,
        "decode_step_ms": step * 1e3,
        "decode_tokens_per_s": batch / step,
        "prefill_s": prefill,
        "prefill_tokens_per_s": batch * context / prefill if prefill is not None else None,
        "same_texts": sum(own == other for own, other in texts) / len(texts),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours over the faster variant of transformers: the lowest of all models and precisions."""
    decode: dict[str, list[float]] = {}
    prefill: list[float] = []
    shapes = dict.fromkeys((r["model"], r["precision"], r["context"], r["batch"]) for r in rows)
    for shape in shapes:
        own = [r for r in rows if (r["model"], r["precision"], r["context"], r["batch"]) == shape]
        (ours,) = [r for r in own if r["side"] == OURS]
        others = [r for r in own if r["side"] != OURS]
        _, _, context, batch = shape
        key = f"ratio_{context}" if context == 512 or batch == 8 else f"ratio_{context}_batch_{batch}"
        decode.setdefault(key, []).append(ours["decode_tokens_per_s"] / max(r["decode_tokens_per_s"] for r in others))
        if all(r["prefill_tokens_per_s"] is not None for r in others):
            prefill.append(ours["prefill_tokens_per_s"] / max(r["prefill_tokens_per_s"] for r in others))
    summary: dict[str, Any] = {key: min(ratios) for key, ratios in decode.items()}
    if prefill:
        summary["ratio_prefill"] = min(prefill)
    summary["texts_agree"] = all(r["same_texts"] >= MIN_AGREEMENT[r["precision"]] for r in rows)
    return summary


def _updated(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `before`, with those of the same shape replaced."""

    def shape(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["model"], r["precision"], r["context"], r["batch"]

    replaced = {shape(r) for r in new}
    return [*(r for r in before if shape(r) not in replaced), *new]


def table(rows: Sequence[dict[str, Any]], threads: int) -> Table:
    """The rows for a person."""
    shown = Table(title=f"Greedy generation, {threads} threads")
    left = ("model", "precision", "")
    for column in ("model", "precision", "context", "batch", "", "decode step, ms", "tokens/s", "prefill tokens/s",
                   "same texts"):  # fmt: skip
        shown.add_column(column, justify="left" if column in left else "right")
    for r in rows:
        shown.add_row(
            r["model"], r["precision"], f"{r['context']:,}", str(r["batch"]),
            r["side"] if r["side"] == OURS else f"transformers, {r['side']}",
            f"{r['decode_step_ms']:.1f}", f"{r['decode_tokens_per_s']:,.0f}",
            "" if r["prefill_tokens_per_s"] is None else f"{r['prefill_tokens_per_s']:,.0f}", f"{r['same_texts']:.0%}",
        )  # fmt: skip
    return shown


def profile_table(profiles: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds of our decode steps, by part of the model; they add up to the step under the profiler."""
    shown = Table(title="Where the time of a decode step goes, ms (the profiler slows it down)")
    shown.add_column("part")
    for p in profiles:
        shown.add_column(f"{p['model']} {p['precision']} {p['context']} x{p['batch']}", justify="right")
    by_part = [{part["part"]: part["ms"] for part in p["parts"]} for p in profiles]
    for part in step_profile.PARTS:
        if any(ms.get(part) for ms in by_part):
            shown.add_row(part, *(f"{ms.get(part, 0):.2f}" for ms in by_part))
    shown.add_row("step", *(f"{sum(ms.values()):.2f}" for ms in by_part), style="bold")
    return shown


def main() -> None:
    """Command line of `make bench-generate`. Exits with 1 if the texts differ, or transformers is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="generations of each side; default 5, or 2 of long prompts")
    parser.add_argument("--precision", action="append", choices=MIN_AGREEMENT, help="only this one")
    parser.add_argument("--model", action="append", choices=step_data.MODELS, help="only this one")
    parser.add_argument("--context", action="append", type=int, choices=NEW_TOKENS, help="only this prompt length")
    parser.add_argument("--batch", action="append", type=int, choices=BATCHES, help="only this number of prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="replace only these rows of bench/results/generate.json")
    options = parser.parse_args()
    try:
        version = step_transformers.require()
    except MoeTrainError as error:
        sys.exit(f"error: {error}")
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    shapes = [(c, b) for c in options.context or NEW_TOKENS for b in options.batch or BATCHES]
    for model in options.model or step_data.MODELS:
        for dtype in options.precision or ["fp32", "bf16"]:
            task = GenerateTask(model, dtype, options.threads)
            rows_of_task, profiles_of_task = measure(task, shapes, options.rounds)
            rows += rows_of_task
            profiles += profiles_of_task
            console.print(table(rows_of_task, options.threads), profile_table(profiles_of_task))
    if options.update:
        before = read("generate")
        rows, profiles = (_updated(before[name], new) for name, new in (("rows", rows), ("profile", profiles)))
    summary = summarise(rows)
    for name, value in summary.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if sys.argv[1:] == [] or options.update:
        print(f"wrote {write('generate', {**summary, 'transformers': version, 'profile': profiles}, rows)}")
    sys.exit(0 if summary["texts_agree"] else 1)


if __name__ == "__main__":
    main()
