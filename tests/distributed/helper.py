"""Runs a function on several processes that form a process group, at the price of a fork each."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from launch.failures import RankError
from launch.local import rank
from launch.local.processes import RankProcesses
from parallel.rank_info import RankInfo

T = TypeVar("T")


def run_distributed(
    fn: Callable[..., T], world_size: int, *args: Any, backend: str = "gloo", timeout_s: float = 120
) -> list[T]:
    """Call `fn(*args)` on `world_size` processes of one process group and return what they return, in rank order.

    `fn` must be a function of a module, and finds its rank by `torch.distributed.get_rank()`. Each rank computes with
    one thread. No process is left when this returns or raises.

    Raises:
        AssertionError: a rank failed; the text has that rank's traceback and the end of its output.
        TimeoutError: it took longer than `timeout_s`; the text has the stack of every rank.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        infos = [RankInfo(i, world_size, i, world_size, "127.0.0.1", 0, "local") for i in range(world_size)]
        setups = [_setup(info, directory) for info in infos]
        work = [(info, backend, timeout_s, directory, fn, args) for info in infos]
        processes = RankProcesses(_work, work, setups, forked=backend == "gloo")
        try:
            processes.run(timeout_s)
        except RankError as error:
            output = _tail(setups[error.rank].log)
            raise AssertionError(f"{error}\n{error.traceback}\noutput of rank {error.rank}:\n{output}") from None
        except TimeoutError as error:
            stacks = "\n".join(f"rank {setup.rank}:\n{_tail(setup.log)}" for setup in setups)
            raise TimeoutError(f"{fn.__qualname__}: {error}\n{stacks}") from None
        return [pickle.loads(Path(directory, f"{i}.pickle").read_bytes()) for i in range(world_size)]


def _setup(info: RankInfo, directory: str) -> rank.Setup:
    log = Path(directory, f"{info.rank}.log")
    environment = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "lo", "TORCH_FR_BUFFER_SIZE": "0"}
    return rank.Setup(info.rank, environment, 1, str(log), str(log.with_suffix(".error.json")), own_terminal=False)


def _work(info: RankInfo, backend: str, timeout_s: float, directory: str, fn: Callable[..., Any], args: tuple) -> None:
    import torch.distributed as dist

    # Before the caller gives up, so that it can show where each rank was.
    faulthandler.dump_traceback_later(max(0.1, timeout_s - 0.3), file=sys.__stderr__)
    store = dist.FileStore(os.path.join(directory, "store"), info.world_size)
    dist.init_process_group(
        backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timedelta(seconds=timeout_s + 5)
    )
    store.add("joined", 1)
    result = fn(*args)
    faulthandler.cancel_dump_traceback_later()
    Path(directory, f"{info.rank}.pickle").write_bytes(pickle.dumps(result))
    # A rank that left would close connections that another one is still making.
    while store.add("joined", 0) < info.world_size:
        time.sleep(0.001)
    rank.leave_groups()


def _tail(log: str, lines: int = 60) -> str:
    path = Path(log)
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
