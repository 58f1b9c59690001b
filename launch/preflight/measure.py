"""What ranks measure together. Every rank calls each of these at the same time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from launch.preflight import disks as disks_
from launch.preflight.disks import Disk, StoragePlace
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

_PATIENCE_S = 10.0  # a file on network storage may be seen late
GEMM_S = 2.0
"""Longer than the time in which a node that is stopped most of the time runs at a stretch."""
_ENOUGH_S, _LEAST_ROUNDS, _MOST_ROUNDS = 0.3, 3, 50  # of a collective
now = time.time
"""The clock that nodes compare."""


def clock(rounds: int = 5) -> float:
    """This node's clock less rank 0's, seconds. The best of a few rounds, as a reply may come late."""
    best: float | None = None
    for _ in range(rounds):
        dist.barrier()
        mine = now()
        reference = torch.tensor([mine], dtype=torch.float64)
        dist.broadcast(reference, 0)
        offset = mine - float(reference)
        best = offset if best is None or abs(offset) < abs(best) else best
    return best or 0.0


def storage(places: list[StoragePlace], info: RankInfo, megabytes: int) -> tuple[list[str], list[Disk]]:
    """Fields of the shared ones of `places` in which rank 0 and this node do not see each other's files, and what the
    node finds in all of them. One rank of each node looks; the others find nothing.
    """
    name, first = f"rank_{info.rank}", info.local_rank == 0
    disks = [disks_.look(place, name, megabytes) for place in places] if first else []
    unseen = []
    for position, place in enumerate(places):
        if place.shared:
            mine = disks[position] if first else None
            if not _seen(place.path / disks_.FOLDER, mine, info):
                unseen.append(place.field)
    dist.barrier()
    if first:
        for place in places:
            disks_.remove(place, name)
    return unseen, disks


def _seen(folder: Path, mine: Disk | None, info: RankInfo) -> bool:
    """Whether this node sees the file of rank 0 in a folder, and rank 0 the node's. True where either has none."""
    dist.barrier()
    wrote = mine is not None and not mine.problem
    writers: list[int | None] = [None] * info.world_size
    dist.all_gather_object(writers, info.rank if wrote else None)
    if writers[0] is None:  # rank 0 cannot write there, which is another finding
        return True
    sees = mine is None or _appears(folder / "rank_0")
    seen: list[list[int]] = [[]]
    if info.rank == 0:
        seen = [[writer for writer in writers if writer is not None and _appears(folder / f"rank_{writer}")]]
    dist.broadcast_object_list(seen, 0)
    return sees and (not wrote or info.rank in seen[0])


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not os.path.exists(path):  # False too where a look fails: `disks.look` tells why
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@dataclass(frozen=True)
class GemmTimes:
    """Matrix multiplications, one after another for a while.

    Args:
        mean_s, median_s, worst_s: of one, without the time in which this rank waited for a core.
        waited: share of all the time in which it waited for a core.
    """

    mean_s: float
    median_s: float
    worst_s: float
    waited: float


def gemm_times(device: torch.device, seconds: float = GEMM_S) -> GemmTimes:
    """Multiply for some seconds, while all ranks multiply.

    The mean includes the time for which the process or its node was stopped; the best of a few would not. Time spent
    waiting for a core is left out, since other processes of a shared machine cause it.
    """
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    left = torch.ones(size, size, dtype=dtype, device=device)
    threads = torch.get_num_threads()
    if not cuda:
        torch.set_num_threads(1)  # the kernel reports the waiting time of each thread
    try:
        _timed(lambda: left @ left, device)  # loads the library
        whole, waiting, times = 0.0, 0.0, []
        while whole < seconds:
            before = _waited_s()
            taken = _timed(lambda: left @ left, device)
            waited = min(_waited_s() - before, taken)
            whole, waiting = whole + taken, waiting + waited
            times.append(taken - waited)
    finally:
        torch.set_num_threads(threads)
    return GemmTimes(sum(times) / len(times), median(times), max(times), waiting / whole)


def _waited_s() -> float:
    """How long this thread was ready to run and had no core, since it began; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def bandwidth(
    layout: ParallelLayout, info: RankInfo, device: torch.device, megabytes: int, timeout_s: int
) -> dict[str, tuple[int, float, float]]:
    """All-reduce and all-to-all GB/s of this rank's group in each dimension, with the group's first rank."""
    result = {}
    for name, ranks in groups_of(layout, info.rank).items():
        group = dist.new_group(ranks, use_local_synchronization=True, timeout=_duration(timeout_s))
        size = megabytes * (1 << 20) // 4 // len(ranks) * len(ranks)
        sent = torch.ones(size, device=device)
        received = torch.empty_like(sent)
        agree = partial(dist.all_reduce, op=dist.ReduceOp.MAX, group=group)
        reduce_s = _best(partial(dist.all_reduce, sent, group=group), agree, device)
        exchange_s = _best(partial(dist.all_to_all_single, received, sent, group=group), agree, device)
        result[name] = (ranks[0], sent.nbytes / reduce_s / 1e9, sent.nbytes / exchange_s / 1e9)
        dist.destroy_process_group(group)
    return result


def groups_of(layout: ParallelLayout, rank: int) -> dict[str, list[int]]:
    """Ranks of the groups, of more than one, that `rank` is in."""
    at = layout.coordinates(rank)
    groups = {
        "tp": [layout.rank_of(tp=i, cp=at.cp, dp=at.dp, pp=at.pp) for i in range(layout.tp)],
        "cp": [layout.rank_of(tp=at.tp, cp=i, dp=at.dp, pp=at.pp) for i in range(layout.cp)],
        "dp": [layout.rank_of(tp=at.tp, cp=at.cp, dp=i, pp=at.pp) for i in range(layout.dp)],
        "pp": [layout.rank_of(tp=at.tp, cp=at.cp, dp=at.dp, pp=i) for i in range(layout.pp)],
        "ep": [layout.expert_rank_of(etp=at.etp, ep=i, edp=at.edp, pp=at.pp) for i in range(layout.ep)],
    }
    return {name: ranks for name, ranks in groups.items() if len(ranks) > 1}


def links(nodes: list[str], info: RankInfo, device: torch.device, megabytes: int) -> float | None:
    """Best bandwidth, GB/s, between this node and its two neighbours: a node with two slow links is slow itself.

    `nodes` are the host names of all ranks. One rank of each node measures; the others get None.
    """
    firsts = [rank for rank, node in enumerate(nodes) if node not in nodes[:rank]]
    if info.rank not in firsts or len(firsts) < 2:
        for _ in range(2):
            dist.barrier()
        return None
    place, best = firsts.index(info.rank), 0.0
    message = torch.ones(megabytes * (1 << 20) // 4, device=device)
    for shift in range(2):  # pairs (0, 1), (2, 3), ... and then (1, 2), (3, 4), ..., round the ring
        other = (place + 1 if (place - shift) % 2 == 0 else place - 1) % len(firsts)
        paired = len(firsts) % 2 == 0 or {place, other} != {0, len(firsts) - 1}
        dist.barrier()
        if paired:
            pair = (info.rank, firsts[other])
            seconds = _best(partial(_swap, message, *pair), partial(_larger, pair=pair), device)
            best = max(best, 2 * message.nbytes / seconds / 1e9)
    return best


def _swap(message: Tensor, rank: int, other: int) -> None:
    received = torch.empty_like(message)
    operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(operations if rank < other else operations[::-1]):
        work.wait()


def _larger(value: Tensor, pair: tuple[int, int]) -> None:
    """Replace `value` by the larger one of two ranks."""
    mine = value.clone()
    received = torch.empty_like(value)
    rank, other = pair
    operations = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(operations if rank < other else operations[::-1]):
        work.wait()
    value.copy_(torch.maximum(mine, received))


def _best(action: Callable[[], object], agree: Callable[[Tensor], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls, which are more where one is quick: other processes can only delay it.
    `agree` makes a tensor of one element the largest of all ranks that act."""
    first = _timed(action, device)
    longest = torch.tensor([first], device=device)
    agree(longest)
    rounds = min(max(int(_ENOUGH_S / max(float(longest), 1e-6)), _LEAST_ROUNDS), _MOST_ROUNDS)
    return min([first, *(_timed(action, device) for _ in range(rounds - 1))])


def _timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _duration(seconds: int) -> object:
    from datetime import timedelta

    return timedelta(seconds=seconds)
