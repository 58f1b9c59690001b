"""A signal ends the run after a step, on every rank, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.checkpoint import checkpoint
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.loop.callbacks.stop import StopOnSignal
from moe_train.resilience import stop
from moe_train.run import Run
from tests.loop.fake_run import fake_run, take_step
from tests.loop.fake_saving import FakeSaving


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the other rank wishes, 0 or 1. Handlers of signals are put back afterwards."""
    wish = [0.0]

    def all_reduce(tensor: torch.Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MAX
        tensor.clamp_(min=wish[0])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield wish
    for number, handler in before.items():
        signal.signal(number, handler)
    stop.reset()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that were saved."""
    steps: list[int] = []

    def begin(run: Run, *, copy: bool) -> FakeSaving:
        steps.append(run.state.step)
        return FakeSaving(run, copy, 1, False)

    monkeypatch.setattr(checkpoint, "begin", begin)
    return steps


def started(tmp_path: Path, launcher: str = "srun", **options: int) -> tuple[Run, list[Any]]:
    run = fake_run(tmp_path, **options)
    object.__setattr__(run.rank, "launcher", launcher)
    checkpoints = CheckpointCallback()
    callbacks = [checkpoints, StopOnSignal(checkpoints)]
    for callback in callbacks:
        callback.on_start(run)
    return run, callbacks


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_ends(number: int, tmp_path: Path, others: list[float], saved: list[int]) -> None:
    run, callbacks = started(tmp_path)
    take_step(run, callbacks)
    for _ in range(20):  # a scheduler may repeat itself
        os.kill(os.getpid(), number)
    with pytest.raises(stop.Stopped) as ended:
        take_step(run, callbacks)
    assert ended.value.code == 75
    assert saved == [2]
    assert run.stopped_by == signal.Signals(number).name


def test_the_wish_of_another_rank_counts(tmp_path: Path, others: list[float], saved: list[int]) -> None:
    run, callbacks = started(tmp_path)
    others[0] = 1.0
    with pytest.raises(stop.Stopped):
        take_step(run, callbacks)
    assert saved == [1]


def test_a_step_is_not_saved_twice(tmp_path: Path, others: list[float], saved: list[int]) -> None:
    run, callbacks = started(tmp_path)
    run.cfg.checkpoint.interval_steps = 1
    others[0] = 1.0
    with pytest.raises(stop.Stopped):
        take_step(run, callbacks)
    assert saved == [1]


def test_a_run_that_is_done_ends_as_usual(tmp_path: Path, others: list[float], saved: list[int]) -> None:
    run, callbacks = started(tmp_path, step=9)
    others[0] = 1.0
    take_step(run, callbacks)
    assert saved == [10]


def test_ranks_of_the_local_launcher_still_end_at_once_by_its_sigterm(tmp_path: Path, others: list[float]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    started(tmp_path, launcher="local")
    assert signal.getsignal(signal.SIGTERM) == before
