"""`make bench-cache` scores every token from rounded keys and values, and compares costs with their limits."""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bench import bench_cache
from bench.bench_cache import BASELINE, CASES, LIMITS, CacheCase
from parallel.architecture.kv_cache import bytes_per_token
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.inference.test_engine import SHAPES, built


def rows(costs: dict[str, float], attention: str = "mla", seed: int = 1) -> list[dict[str, Any]]:
    """Of one run, whose cache has fewer bytes with each format, and whose losses differ from text to text."""
    losses = [[2.0, 1.0], [3.0, 2.5]]
    return [
        {"attention": attention, "seed": seed, "bytes_per_token": 1000.0 / (1 + number), "decode_difference": 1e-6,
         **bench_cache.row(CacheCase(name, name), [[loss + cost for loss in text] for text in losses], losses)}
        for number, (name, cost) in enumerate({BASELINE.name: 0.0, **costs}.items())
    ]  # fmt: skip


def test_cost_is_the_increase_of_the_perplexity_of_all_texts() -> None:
    row = bench_cache.row(CASES[1], [[2.0, 2.04], [3.1, 2.9]], [[2.0, 2.0], [3.0, 3.0]])
    assert row["perplexity"] == pytest.approx(2.71828**2.51, rel=1e-4)
    assert row["perplexity_cost"] == pytest.approx(0.01005, rel=1e-3)
    assert row["standard_error"] == pytest.approx(0.01 / 2**0.5)
    assert row["mean_absolute_difference"] == pytest.approx(0.06)


@pytest.mark.parametrize("name", LIMITS)
def test_the_worst_seed_has_to_stay_below_each_limit(name: str) -> None:
    within = {name: 0.9 * limit for name, limit in LIMITS.items()}
    good = rows(within, seed=1)
    assert bench_cache.summarise(good)["limits_hold"]
    bad = good + rows({**within, name: 1.1 * LIMITS[name]}, seed=2) + rows(within, seed=3)
    summary = bench_cache.summarise(bad)
    assert not summary["limits_hold"]
    assert summary["largest_cost"]["mla"][name] == pytest.approx(1.1 * LIMITS[name], rel=0.02)
    assert bench_cache.summarise(good + rows({"int4": 0.1}, "gqa"))["limits_hold"]  # they are those of latents


def test_decoding_that_differs_from_one_prompt_is_reported() -> None:
    measured = rows(dict.fromkeys(LIMITS, 0.0))
    measured[2]["decode_difference"] = 0.01
    assert not bench_cache.summarise(measured)["decoding_agrees"]


def test_table_and_picture_show_every_format(tmp_path: Path) -> None:
    measured = rows({"fp8": 1e-5, "int4": 0.015}, seed=7) + rows({"int8": -1e-4}, "gqa", seed=7)
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(bench_cache.table(measured))
    text = console.export_text()
    assert "seed 7" in text
    assert "+1.511%" in text
    assert "-0.010%" in text
    bench_cache.draw(measured, tmp_path / "one.svg")
    bench_cache.draw(measured, tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in drawn for name in ("mla", "gqa", "fp8", "int8", "int4", "bytes per token"))
    assert drawn == (tmp_path / "two.svg").read_text(encoding="utf-8")


def scores(shape: str) -> list[tuple[Any, Any, float, float]]:
    """For each case: losses of the tokens of two prompts, the same one token in each pass; bytes, predicted bytes."""
    ranks, chunks = built({}, SHAPES[shape])
    model = SimpleNamespace(ranks=ranks, chunks=chunks)
    draw = random.Random(3)
    texts = [[draw.randrange(small_run.VOCABULARY) for _ in range(length)] for length in (21, 33)]
    found = []
    for case in bench_cache.MODELS[ranks.cfg.model.attention].cases:
        whole, single = (bench_cache._score(model, texts, case, tokens) for tokens in (256, 1))
        predicted = bytes_per_token(ranks.cfg.model, case.cache_format, case.rotary_format)
        losses = [[loss for text in score["losses"] for loss in text] for score in (whole, single)]
        found.append((*losses, whole["bytes_per_token"], predicted))
    return found


@pytest.mark.parametrize("shape", ["mla", "gqa"])
def test_a_prompt_attends_to_what_the_format_keeps_as_decoding_does(shape: str) -> None:
    ((baseline, *others),) = run_distributed(scores, 1, shape)
    assert baseline[0] == pytest.approx(baseline[1], abs=1e-5)
    for whole, single, allocated, predicted in others:
        assert whole == pytest.approx(single, abs=2e-3)
        assert whole != pytest.approx(baseline[0], abs=1e-6)
        assert allocated == predicted
