"""Faults of a drill: which are refused, when one is due, and that each happens once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resilience import Fault
from moe_train.resilience.inject import Once, is_due, touches
from parallel.errors import ConfigError


def test_what_an_entry_leaves_open() -> None:
    """All ranks, once, at the beginning of the step, at once."""
    (fault,) = compose(["resilience.inject=[{kind:kill,step:3}]"]).resilience.inject
    assert vars(fault) == {
        "kind": "kill", "rank": -1, "step": 3, "sample": -1, "samples": 1, "steps": 1, "at": "begin", "after": 0.0,
        "seconds": 1.0, "factor": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("{kind:explode,step:1}", "resilience.inject[0].kind=explode is not one of kill, stop"),
        ("{kind:kill,rank:-2,step:1}", "resilience.inject[0].rank=-2 is below the smallest value -1"),
        ("{kind:slow,step:1,steps:0}", "resilience.inject[0].steps=0 is below the smallest value 1"),
        ("{kind:nan,sample:1,samples:0}", "resilience.inject[0].samples=0 is below the smallest value 1"),
        ("{kind:kill,step:1,at:noon}", "resilience.inject[0].at=noon is not one of begin, end"),
    ],
)
def test_a_value_that_a_fault_cannot_have_is_refused(entry: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(compose([f"resilience.inject=[{entry}]"]))
    assert what in str(refused.value)
    assert "use 'resilience.inject=[{kind:" in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("{kind:kill,rank:1}", "which needs step, from 1, or with nan and spike sample"),
        ("{kind:kill,step:0}", "which needs step, from 1"),
        ("{kind:nan,step:3,sample:4}", "which needs step"),
        ("{kind:kill,sample:3}", "but sample is for nan and spike, not for kill"),
        ("{kind:slow,sample:0}", "but sample is for nan and spike, not for slow"),
        ("{kind:kill,rank:2,step:1}", "there are 2 ranks"),
        ("{kind:kill,rank:1,step:201}", "the run ends after step 200"),
    ],
)
def test_a_fault_that_never_happens_is_refused_before_anything_starts(entry: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(compose(["parallel.dp=2", "batch.global_batch_size=2", f"resilience.inject=[{entry}]"]))
    assert str(refused.value).startswith(f"resilience.inject has {entry}, ")
    assert what in str(refused.value)
    assert "use resilience.inject=[]" in str(refused.value)


def test_when_and_where_it_happens() -> None:
    fault = Fault("slow", rank=1, step=3, steps=2)
    assert [is_due(fault, 1, step, "begin") for step in (2, 3, 4, 5)] == [False, True, True, False]
    assert not is_due(fault, 0, 3, "begin")
    assert not is_due(fault, 1, 3, "end")
    poison = Fault("nan", sample=32, samples=8)
    assert [touches(poison, 0, first, first + 8) for first in (16, 24, 32, 39, 40)] == [False, False, True, True, False]
    assert not is_due(poison, 0, 1, "begin")
    assert touches(Fault("spike", sample=0), 0, 0, 8)


def test_an_entry_without_a_rank_is_for_all_of_them() -> None:
    everywhere, sample = Fault("kill", step=3, at="end"), Fault("nan", sample=3)
    assert [is_due(everywhere, rank, 3, "end") for rank in (0, 7)] == [True, True]
    assert not is_due(everywhere, 0, 3, "begin")
    assert [touches(sample, rank, 0, 8) for rank in (0, 7)] == [True, True]
    assert [touches(Fault("nan", rank=1, sample=3), rank, 0, 8) for rank in (0, 1)] == [False, True]


def test_a_fault_of_a_step_is_in_no_sample_and_one_of_a_sample_in_no_step() -> None:
    assert not touches(Fault("nan", step=3, samples=8), 0, 0, 8)
    assert not any(is_due(Fault("nan", sample=3), 0, step, "begin") for step in range(-1, 5))


def test_a_claim_is_on_disk_before_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault may end the machine."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    assert Once(tmp_path, rank=1).claim(3)
    assert synced == [str(tmp_path / "injected" / "3_rank_1")]


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
