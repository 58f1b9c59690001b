"""Faults of a drill: how they are written, and that each happens once."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.resilience.inject import Fault, Once, parse
from parallel.errors import ConfigError


def test_an_entry_is_read() -> None:
    assert parse("kill:rank=1:step=7:at=end:after=0.05") == Fault("kill", rank=1, step=7, at="end", after=0.05)
    assert parse("nan:sample=32:samples=8") == Fault("nan", sample=32, samples=8)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("explode:step=1", "explode is not one of kill, stop"),
        ("kill:step=x", "step=x is no number"),
        ("kill:node=1:step=2", "node=1 is not one of rank=, step="),
        ("kill:rank=1", "it needs step="),
        ("nan:step=3:sample=4", "it needs step="),
        ("kill:sample=3", "sample= is for nan and spike, not for kill"),
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


def test_each_happens_once_in_a_run_directory(tmp_path: Path) -> None:
    first = Once(tmp_path, rank=1)
    assert [first.claim(0, times=2) for _ in range(3)] == [True, True, False]
    again = Once(tmp_path, rank=1)
    assert [again.claim(0, times=2), again.claim(1)] == [False, True]
    assert Once(tmp_path, rank=0).claim(0)
