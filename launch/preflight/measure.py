"""What ranks measure together. Every rank calls each of these at the same time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

_PATIENCE_S = 10.0  # a file on network storage may be seen late
now = time.time
"""The clock that nodes compare."""


def clock(rounds: int = 5) -> float:
    """This node's clock less rank 0's, seconds. The best of a few rounds, as a message may come late."""
    best: float | None = None
    for _ in range(rounds):
        dist.barrier()
        mine = now()
        reference = torch.tensor([mine], dtype=torch.float64)
        dist.broadcast(reference, 0)
        offset = mine - float(reference)
        best = offset if best is None or abs(offset) < abs(best) else best
    return best or 0.0


def storage(directory: Path, info: RankInfo, megabytes: int) -> tuple[bool, float | None, float | None]:
    """Whether rank 0 and this node see each other's files in `directory`, and MB/s of writing and reading there.

    One rank of each node writes and reads; the others get None.
    """
    first = info.local_rank == 0
    place = directory / ".preflight"
    own = place / f"rank_{info.rank}"
    block = os.urandom(1 << 20)
    write_mb_s = read_mb_s = None
    if first:
        try:
            place.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            with own.open("wb") as file:
                for _ in range(megabytes):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            write_mb_s = megabytes / (time.perf_counter() - start)
        except OSError:
            write_mb_s = 0.0
    dist.barrier()
    sees = not first or _appears(place / "rank_0")
    writers: list[int | None] = [None] * info.world_size
    dist.all_gather_object(writers, info.rank if first else None)
    seen: list[list[int]] = [[]]
    if info.rank == 0:
        seen = [[writer for writer in writers if writer is not None and _appears(place / f"rank_{writer}")]]
    dist.broadcast_object_list(seen, 0)
    if first and own.exists():
        start = time.perf_counter()
        own.read_bytes()
        read_mb_s = megabytes / (time.perf_counter() - start)
    dist.barrier()
    if first:
        own.unlink(missing_ok=True)
    return sees and (not first or info.rank in seen[0]), write_mb_s, read_mb_s


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def matmul(device: torch.device, rounds: int = 3) -> float:
    """Seconds of a matrix multiplication, while all ranks multiply; the best of a few rounds."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left = torch.ones(size, size, dtype=dtype, device=device)
    return min(_timed(lambda: left @ left, device) for _ in range(rounds + 1))


def bandwidth(
    layout: ParallelLayout, info: RankInfo, device: torch.device, megabytes: int, timeout_s: int
) -> dict[str, tuple[int, float, float]]:
    """All-reduce and all-to-all GB/s of this rank's group in each dimension, with the group's first rank."""
    found = {}
    for name, ranks in groups_of(layout, info.rank).items():
        group = dist.new_group(ranks, use_local_synchronization=True, timeout=_duration(timeout_s))
        size = megabytes * (1 << 20) // 4 // len(ranks) * len(ranks)
        sent = torch.ones(size, device=device)
        received = torch.empty_like(sent)
        reduce_s = min(_timed(lambda g=group, t=sent: dist.all_reduce(t, group=g), device) for _ in range(3))  # type: ignore[misc]
        exchange_s = min(
            _timed(lambda g=group, a=received, b=sent: dist.all_to_all_single(a, b, group=g), device)  # type: ignore[misc]
            for _ in range(3)
        )
        found[name] = (ranks[0], sent.nbytes / reduce_s / 1e9, sent.nbytes / exchange_s / 1e9)
        dist.destroy_process_group(group)
    return found


def groups_of(layout: ParallelLayout, rank: int) -> dict[str, list[int]]:
    """Ranks of the groups, of more than one, that `rank` is in."""
    at = layout.coordinates(rank)
    found = {
        "tp": [layout.rank_of(tp=i, cp=at.cp, dp=at.dp, pp=at.pp) for i in range(layout.tp)],
        "cp": [layout.rank_of(tp=at.tp, cp=i, dp=at.dp, pp=at.pp) for i in range(layout.cp)],
        "dp": [layout.rank_of(tp=at.tp, cp=at.cp, dp=i, pp=at.pp) for i in range(layout.dp)],
        "pp": [layout.rank_of(tp=at.tp, cp=at.cp, dp=at.dp, pp=i) for i in range(layout.pp)],
        "ep": [layout.expert_rank_of(etp=at.etp, ep=i, edp=at.edp, pp=at.pp) for i in range(layout.ep)],
    }
    return {name: ranks for name, ranks in found.items() if len(ranks) > 1}


def links(nodes: list[str], info: RankInfo, device: torch.device, megabytes: int) -> float | None:
    """Best bandwidth, GB/s, between this node and the two beside it: a node with two slow links is slow itself.

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
        if paired and len(firsts) > 1:
            seconds = min(_timed(lambda o=firsts[other]: _swap(message, info.rank, o), device) for _ in range(3))  # type: ignore[misc]
            best = max(best, 2 * message.nbytes / seconds / 1e9)
    return best


def _swap(message: Tensor, rank: int, other: int) -> None:
    received = torch.empty_like(message)
    operations = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(operations if rank < other else operations[::-1]):
        work.wait()


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
