"""Faults of a drill: how they are written, and that each happens once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.resilience.inject import Fault, Once, parse
from parallel.errors import ConfigError


def test_an_entry_is_read() -> None:
    assert parse("kill:rank=1:step=7:at=end:after=0.05") == Fault("kill", rank=1, step=7, at="end", after=0.05)
    assert parse("nan:sample=32:samples=8") == Fault("nan", sample=32, samples=8)
    assert parse("raise:step=1:at=begin") == Fault("raise", step=1)


def test_what_an_entry_leaves_open() -> None:
    """All ranks, once, at the beginning of the step, at once."""
    assert vars(parse("kill:step=3")) == {
        "kind": "kill", "rank": -1, "step": 3, "sample": -1, "samples": 1, "steps": 1, "at": "begin", "after": 0.0,
        "seconds": 1.0, "factor": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("explode:step=1", "explode is not one of kill, stop"),
        ("kill:step=x", "step=x is not a number"),
        ("kill:node=1:step=2", "node=1 is not one of rank=, step="),
        ("kill:step", "step is not one of rank=, step="),
        ("kill:kind=stop:step=2", "kind=stop is not one of rank=, step="),
        ("kill:rank=-2:step=1", "rank=-2 is below -1, so that it never happens"),
        ("slow:step=1:steps=0", "steps=0 is below 1, so that it never happens"),
        ("nan:sample=1:samples=0", "samples=0 is below 1, so that it never happens"),
        ("kill:rank=1", "it needs step="),
        ("kill:step=0", "it needs step= (from 1)"),
        ("nan:step=3:sample=4", "it needs step="),
        ("kill:sample=3", "sample= is for nan and spike, not for kill"),
        ("slow:sample=0", "sample= is for nan and spike, not for slow"),
        ("kill:step=1:at=noon", "at=noon is neither begin nor end"),
        ("kill:rank=2:step=1", "there are 2 ranks"),
        ("kill:rank=1:step=201", "the run ends after step 200"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_starts(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(compose(["parallel.dp=2", "batch.global_batch_size=2", f"resilience.inject=['{text}']"]))
    assert what in str(refused.value)
    assert "use resilience.inject=[]" in str(refused.value)


def test_when_and_where_it_happens() -> None:
    fault = parse("slow:rank=1:step=3:steps=2")
    assert [fault.due(1, step, "begin") for step in (2, 3, 4, 5)] == [False, True, True, False]
    assert not fault.due(0, 3, "begin")
    assert not fault.due(1, 3, "end")
    poison = parse("nan:sample=32:samples=8")
    assert [poison.touches(0, first, first + 8) for first in (16, 24, 32, 39, 40)] == [False, False, True, True, False]
    assert not poison.due(0, 1, "begin")
    assert parse("spike:sample=0").touches(0, 0, 8)


def test_an_entry_without_a_rank_is_for_all_of_them() -> None:
    everywhere, sample = parse("kill:step=3:at=end"), parse("nan:sample=3")
    assert [everywhere.due(rank, 3, "end") for rank in (0, 7)] == [True, True]
    assert not everywhere.due(0, 3, "begin")
    assert [sample.touches(rank, 0, 8) for rank in (0, 7)] == [True, True]
    assert [parse("nan:rank=1:sample=3").touches(rank, 0, 8) for rank in (0, 1)] == [False, True]


def test_a_fault_of_a_step_is_in_no_sample_and_one_of_a_sample_in_no_step() -> None:
    assert not parse("nan:step=3:samples=8").touches(0, 0, 8)
    assert not any(parse("nan:sample=3").due(0, step, "begin") for step in range(-1, 5))


def test_each_happens_once_in_a_run_directory(tmp_path: Path) -> None:
    open_files = len(os.listdir("/proc/self/fd"))
    first = Once(tmp_path / "not/made/yet", rank=1)
    assert [first.claim(3), first.claim(3)] == [True, False]
    first = Once(tmp_path, rank=1)
    assert [first.claim(0, times=2) for _ in range(3)] == [True, True, False]
    again = Once(tmp_path, rank=1)
    assert [again.claim(0, times=2), again.claim(1)] == [False, True]
    assert Once(tmp_path, rank=0).claim(0)
    assert len(os.listdir("/proc/self/fd")) == open_files
