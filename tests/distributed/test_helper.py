"""The helper that every distributed test stands on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from launch.local.processes import RankProcesses
from tests.distributed.helper import run_distributed
from tests.forked import below


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), torch.get_num_threads()


def _fail_on_two() -> None:
    if dist.get_rank() == 2:
        raise ValueError("the third rank is wrong")
    dist.all_reduce(torch.ones(1))  # never completes


def _kill_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def _hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("about to wait", flush=True)
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(60)


def _ranks_alive() -> list[int]:
    return [process.pid for process in below(os.getpid()) if process.status() != psutil.STATUS_ZOMBIE]


def test_values_come_back_in_rank_order() -> None:
    assert run_distributed(_sum_of_ranks, 4, 10) == [(i, 46.0, 1) for i in range(4)]


def test_the_end_of_a_rank_is_noticed_without_another_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankProcesses.wait, "__defaults__", (-1, 60.0))  # one that only looks at times takes 60 s
    assert run_distributed(_sum_of_ranks, 2, 0, timeout_s=30) == [(i, 1.0, 1) for i in range(2)]


def test_the_first_error_ends_the_others_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 2: ValueError: the third rank is wrong(.|\n)*in _fail_on_two"):
        run_distributed(_fail_on_two, 4)
    assert time.monotonic() - began < 40  # the process group would wait for 120
    assert _ranks_alive() == []


def test_a_killed_rank_is_named_although_others_fail_because_of_it() -> None:
    with pytest.raises(AssertionError, match="rank 1 was killed by SIGKILL"):
        run_distributed(_kill_one, 3)
    assert _ranks_alive() == []


def test_a_hang_ends_with_the_stack_of_every_rank() -> None:
    with pytest.raises(TimeoutError) as caught:
        run_distributed(_hang, 2, timeout_s=3)
    text = str(caught.value)
    assert "about to wait" in text
    assert text.count("in _hang") == 2
    assert "all_reduce" in text
    assert _ranks_alive() == []
    assert multiprocessing.active_children() == []
