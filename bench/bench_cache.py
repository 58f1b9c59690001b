"""Perplexity and bytes per token of each format of the KV cache, for tiny models trained here.

`make bench-cache` trains `model=tiny` (bench/trained_tiny.py) for 1,000 steps, with three seeds, and with grouped-query
attention with one. The engine then scores held-out text of the same source in fp32, with each format of its cache.

It computes each text as one prompt. With a format that rounds, attention reads keys and values of all tokens of the
text from the cache, those of the token itself too: what a token that decodes attends to. One text is scored a second
time, one token in each forward pass, and the losses must agree.

Writes bench/results/cache_formats.json and docs/cache_formats.svg. Exits with 1 if a format costs more than its limit.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench import loaded_run, trained_tiny
from bench.results import write
from bench.workers import Requests, Worker

Row = dict[str, Any]
PICTURE = Path(__file__).parent.parent / "docs" / "cache_formats.svg"
LIMITS = {"fp8": 0.001, "int8": 0.002, "int4": 0.02}
"""Of the increase in perplexity, in a model with latent attention."""
LARGEST_DECODE_DIFFERENCE = 1e-3
"""Of the mean loss of a text, nats per token, between one prompt and one token in each pass. Sums in another order
round a few numbers to the next one of the format."""


@dataclass(frozen=True)
class CacheCase:
    """One format of the cache.

    Args:
        cache_format, rotary_format: of the engine's options.
    """

    name: str
    cache_format: str
    rotary_format: str | None = None


BASELINE = CacheCase("fp32", "fp32")
CASES = (
    BASELINE,
    CacheCase("bf16", "bf16"),
    CacheCase("fp8", "fp8"),  # the layout of FlashMLA: rotary key in bf16
    CacheCase("int8", "int8"),
    CacheCase("int4", "int4"),
    CacheCase("fp8, rotary key too", "fp8", "fp8"),
    CacheCase("int8, rotary key too", "int8", "int8"),
    CacheCase("int4, rotary key too", "int4", "int4"),
)


@dataclass(frozen=True)
class ScoredModel:
    """A model that is trained and scored.

    Args:
        changes: of the config in trained_tiny.py.
        limits: by format, of the increase in perplexity.
    """

    changes: tuple[str, ...]
    seeds: tuple[int, ...]
    cases: tuple[CacheCase, ...]
    limits: dict[str, float]


MODELS = {
    "mla": ScoredModel((), (1234, 1, 2), CASES, LIMITS),
    "gqa": ScoredModel(
        trained_tiny.GROUPED_QUERY, (1234,), tuple(case for case in CASES if case.rotary_format is None), {}
    ),
}
"""By kind of attention."""


def prepare(run_dir: Path, threads: int) -> Requests:
    """The requests of the process that has the model of `run_dir`."""
    model = loaded_run.load(run_dir, "fp32", threads)
    return {"score": lambda *args: _score(model, *args)}


def _score(model: Any, texts: list[list[int]], case: CacheCase, tokens_per_pass: int) -> Row:
    """Bytes that the cache has for each token, and the loss of each token of each text, nats."""
    from moe_train.inference.engine import Engine, EngineOptions
    from moe_train.inference.sampling_params import SamplingParams

    blocks = sum(-(-len(text) // EngineOptions.block_size) for text in texts[:8])
    options = EngineOptions(
        blocks, max_batch_tokens=tokens_per_pass, max_sequences=8, cache_format=case.cache_format,
        rotary_format=case.rotary_format,
    )  # fmt: skip
    with Engine(model.ranks, model.chunks, options) as engine:
        outputs = engine.generate(texts, SamplingParams(max_new_tokens=0, prompt_logprobs=0))
        allocated = engine.cache.num_bytes / (options.num_blocks * options.block_size)
    losses = [[-logprob for logprob in output.prompt_logprobs or []] for output in outputs]
    return {"bytes_per_token": allocated, "losses": losses}


def measure(run_dir: Path, attention: str, seed: int, texts: list[list[int]], threads: int) -> list[Row]:
    """A row for each format of the cache, the baseline first."""
    worker = Worker(prepare, run_dir, threads)
    try:
        rows = []
        baseline: list[list[float]] = []
        for case in MODELS[attention].cases:
            found = worker.ask("score", texts, case, 2048)
            decoded = worker.ask("score", texts[:1], case, 1)
            baseline = baseline or found["losses"]
            rows.append({
                "attention": attention, "seed": seed, **row(case, found["losses"], baseline),
                "bytes_per_token": found["bytes_per_token"],
                "decode_difference": abs(float(np.subtract(decoded["losses"][0], found["losses"][0]).mean())),
            })  # fmt: skip
    finally:
        worker.stop()
    return rows


def row(case: CacheCase, losses: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Row:
    """Perplexity of one format over texts of the same length, and how much more it is than that of the baseline.

    Args:
        losses, baseline: of each token of each text, nats.
    """
    differences = np.subtract(losses, baseline)
    by_text = differences.mean(axis=1)
    return {
        "format": case.name,
        "perplexity": math.exp(np.mean(losses)),
        "perplexity_cost": math.expm1(differences.mean()),
        "standard_error": float(by_text.std() / math.sqrt(len(by_text))),
        "mean_absolute_difference": float(np.abs(differences).mean()),
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The largest cost of each format over all seeds, by kind of attention, and whether the limits hold."""
    worst: dict[str, dict[str, float]] = {}
    for r in rows:
        costs = worst.setdefault(r["attention"], {})
        costs[r["format"]] = max(costs.get(r["format"], -math.inf), r["perplexity_cost"])
    holds = all(
        costs[name] < limit for attention, costs in worst.items() for name, limit in MODELS[attention].limits.items()
    )
    difference = max(r["decode_difference"] for r in rows)
    return {
        "limits_hold": holds,
        "decoding_agrees": difference < LARGEST_DECODE_DIFFERENCE,
        "largest_cost": worst,
        "limits": LIMITS,
        "largest_decode_difference": difference,
    }


def table(rows: Sequence[Row]) -> Table:
    """A line for each kind of attention and format: bytes, and the cost with each seed."""
    seeds = list(dict.fromkeys(r["seed"] for r in rows))
    shown = Table(title="Perplexity cost of the format of the KV cache", title_justify="left")
    left = ("attention", "format")
    columns = [*left, "bytes per token", "of fp32", "perplexity", *(f"seed {seed}" for seed in seeds), "largest",
               "of a token, nats"]  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="left" if column in left else "right")
    for attention, name in dict.fromkeys((r["attention"], r["format"]) for r in rows):
        own = [r for r in rows if (r["attention"], r["format"]) == (attention, name)]
        base = next(r for r in rows if r["attention"] == attention and r["format"] == BASELINE.name)
        costs = [f"{r['perplexity_cost']:+.3%} ± {r['standard_error']:.3%}" for r in own]
        shown.add_row(
            attention, name, f"{own[0]['bytes_per_token']:,.0f}",
            f"{own[0]['bytes_per_token'] / base['bytes_per_token']:.3f}",
            " ".join(f"{r['perplexity']:.2f}" for r in own), *costs, *[""] * (len(seeds) - len(costs)),
            f"{max(r['perplexity_cost'] for r in own):+.3%}",
            f"{max(r['mean_absolute_difference'] for r in own):.5f}",
        )  # fmt: skip
    return shown


def draw(rows: Sequence[Row], file: Path) -> None:
    """A chart for each kind of attention: cost of each format and seed by bytes per token, with the limits."""
    # Text stays text, and the same numbers make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
        kinds = list(dict.fromkeys(r["attention"] for r in rows))
        colors = {case.name: f"C{number}" for number, case in enumerate(CASES)}
        figure = Figure(figsize=(4.5 * len(kinds), 4.5), layout="constrained")
        axes_of = dict(zip(kinds, figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], strict=True))
        for attention, axes in axes_of.items():
            own = [r for r in rows if r["attention"] == attention]
            for name in dict.fromkeys(r["format"] for r in own):
                points = [(r["bytes_per_token"], 100 * r["perplexity_cost"]) for r in own if r["format"] == name]
                color = colors[name]
                axes.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=4, color=color, label=name)
                if name in MODELS[attention].limits:
                    limit = points[0][0], 100 * MODELS[attention].limits[name]
                    axes.plot(*limit, marker="v", color=color, fillstyle="none", linestyle="",
                              label=f"limit of {name}")  # fmt: skip
            axes.axhline(0, color="grey", linewidth=0.5)
            axes.set(xlabel="bytes per token", title=attention, xscale="log")
            sizes = sorted({r["bytes_per_token"] for r in own})
            axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], rotation=90)
            axes.minorticks_off()
        first = axes_of[kinds[0]]
        first.set_yscale("symlog", linthresh=0.01)
        first.set_ylim(-1, max(5, *(200 * r["perplexity_cost"] for r in rows)))
        first.set_ylabel("increase in perplexity, %")
        shown = {line.get_label(): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}
        figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=4)
        figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """Command line of `make bench-cache`. Exits with 1 if a format costs more than its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, help="directory of trained runs, ATTENTION-SEED; those missing are trained"
    )
    parser.add_argument("--attention", action="append", choices=MODELS, help="only this kind")
    parser.add_argument("--seed", action="append", type=int, help="repeat for more (default: 1234, 1 and 2; gqa: 1234)")
    parser.add_argument("--steps", type=int, default=trained_tiny.STEPS)
    parser.add_argument("--sequences", type=int, default=trained_tiny.SEQUENCES, help="held-out texts")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as directory:
        runs = options.runs or Path(directory)
        for attention in options.attention or MODELS:
            for seed in options.seed or MODELS[attention].seeds:
                run_dir = runs / f"{attention}-{seed}"
                if not run_dir.exists():
                    trained_tiny.train(run_dir, options.steps, seed, MODELS[attention].changes)
                texts = trained_tiny.held_out(run_dir, options.sequences).tolist()
                rows += measure(run_dir, attention, seed, texts, options.threads)
    summary = summarise(rows)
    Console(width=None if sys.stdout.isatty() else 180).print(table(rows))
    for name in ("limits_hold", "decoding_agrees", "largest_decode_difference"):
        print(f"{name}: {summary[name]}")
    facts = {"steps": options.steps, "held_out_tokens": options.sequences * trained_tiny.SEQUENCE}
    whole = (options.attention, options.seed) == (None, None)
    if whole and options.steps >= trained_tiny.STEPS and options.sequences >= trained_tiny.SEQUENCES:
        print(f"wrote {write('cache_formats', {**summary, **facts}, rows)}")
        draw(rows, PICTURE)
        print(f"wrote {PICTURE}")
    sys.exit(0 if summary["limits_hold"] and summary["decoding_agrees"] else 1)


if __name__ == "__main__":
    main()
