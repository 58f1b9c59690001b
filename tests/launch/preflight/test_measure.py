"""What ranks of `moe-preflight` measure together, with what the other ranks do in place of a process group."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.preflight import disks, measure
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

CPU = torch.device("cpu")


def info(rank: int, world_size: int, local_rank: int = 0) -> RankInfo:
    return RankInfo(rank, world_size, local_rank, 1, "", 0, "local")


class Others:
    """`torch.distributed` as one rank sees it. What the other ranks contribute is given.

    Args:
        gathered: results of `all_gather_object`, in order, in which None stands for this rank's own entry.
        told: results of `broadcast_object_list`, in order, where this rank is not the source.
    """

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, rank: int = 0, gathered: tuple[list[object], ...] = (), told: tuple[object, ...] = ()) -> None:
        self.rank, self.gathered, self.told = rank, iter(gathered), iter(told)
        self.said: list[object] = []
        self.gave: list[object] = []
        self.groups: list[tuple[object, ...]] = []
        self.barriers = 0

    def barrier(self) -> None:
        self.barriers += 1

    def all_gather_object(self, found: list[object], own: object) -> None:
        found[:] = next(self.gathered)
        found[self.rank] = own
        self.gave.append(own)

    def broadcast_object_list(self, found: list[object], source: int) -> None:
        assert source == 0
        if self.rank:
            found[0] = next(self.told)
        else:
            self.said.append(found[0])

    def new_group(self, ranks: list[int], **settings: object) -> object:
        self.groups.append(("new", *ranks))
        return ranks

    def destroy_process_group(self, group: list[int]) -> None:
        self.groups.append(("gone", *group))

    def all_reduce(self, *_: object, **__: object) -> None: ...

    def all_to_all_single(self, *_: object, **__: object) -> None: ...


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Others]:
    def become(*args: Any, **kwargs: Any) -> Others:
        found = Others(*args, **kwargs)
        monkeypatch.setattr(measure, "dist", found)
        return found

    return become


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [([9.0, -2.0, 0.25, -3.0, 4.0], 0.25), ([5.0, 4.0, -1.5, 2.0, 3.0], -1.5), ([0.0, 1.0, 1.0, 1.0, 1.0], 0.0)],
)
def test_the_offset_of_a_clock_is_that_of_the_round_with_least_delay(
    offsets: list[float], expected: float, others: Callable[..., Others], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive where the clock of this node is ahead of rank 0's."""
    found, left = others(rank=1), iter(offsets)

    def broadcast(reference: torch.Tensor, source: int) -> None:
        assert (reference.dtype, source) == (torch.float64, 0)
        reference.fill_(1.7e9 - next(left))

    monkeypatch.setattr(found, "broadcast", broadcast, raising=False)
    monkeypatch.setattr(measure, "now", lambda: 1.7e9)
    assert measure.clock() == pytest.approx(expected, abs=1e-6)
    assert found.barriers == 5
    assert list(left) == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time passes only in `sleep`; `late` is called at each."""
    clock = SimpleNamespace(now=0.0, late=lambda: None)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        clock.late()

    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def places(root: Path) -> list[disks.StoragePlace]:
    return [
        disks.StoragePlace("run_dir", root / "run", True, 0, 0),
        disks.StoragePlace("checkpoint.local_dir", root / "own", False, 0, 0),
    ]


def test_a_node_that_sees_the_file_of_rank_0_shares_its_directory(
    tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace
) -> None:
    """And where rank 0 sees its own. Nothing is left of either."""
    (tmp_path / "run/.preflight").mkdir(parents=True)
    (tmp_path / "run/.preflight/rank_0").touch()
    found = others(rank=2, gathered=([0, None, None, 3],), told=([0, 2],))
    unseen, looked = measure.storage(places(tmp_path), info(2, 4), 1)
    assert unseen == []
    assert found.gave == [2]
    assert [(disk.field, disk.problem) for disk in looked] == [("run_dir", ""), ("checkpoint.local_dir", "")]
    assert found.barriers == 2
    assert impatient.now == 0
    assert [path.name for path in (tmp_path / "run/.preflight").iterdir()] == ["rank_0"]
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize("cause", ["its own storage", "rank 0 does not see it"])
def test_a_node_with_a_directory_of_its_own_is_found(
    cause: str, tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace
) -> None:
    if cause != "its own storage":
        (tmp_path / "run/.preflight").mkdir(parents=True)
        (tmp_path / "run/.preflight/rank_0").touch()
    others(rank=2, gathered=([0, None, None, 3],), told=([0, 2] if cause == "its own storage" else [0, 3],))
    assert measure.storage(places(tmp_path), info(2, 4), 1)[0] == ["run_dir"]
    assert (impatient.now >= measure._PATIENCE_S) == (cause == "its own storage")


def test_the_directory_that_is_not_shared_is_named(
    tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace
) -> None:
    """In either position of two."""
    (tmp_path / "shared/.preflight").mkdir(parents=True)
    both = [disks.StoragePlace(f"{name}.dir", tmp_path / name, True, 0, 0) for name in ("shared", "alone")]
    for given in (both, both[::-1]):
        (tmp_path / "shared/.preflight/rank_0").touch()
        others(rank=1, gathered=([0, None],) * 2, told=([0, 1],) * 2)
        assert measure.storage(given, info(1, 2), 1)[0] == ["alone.dir"]


def test_rank_0_tells_which_files_it_sees(
    tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace
) -> None:
    """A file on network storage may be seen late; ranks that are not the first of their node wrote none."""
    found = others(rank=0, gathered=([None, None, 2, 3],))
    folder = tmp_path / "run/.preflight"
    impatient.late = lambda: (folder / "rank_2").touch() if impatient.now > measure._PATIENCE_S / 2 else None
    unseen, _ = measure.storage(places(tmp_path), info(0, 4), 1)
    assert (unseen, found.said) == ([], [[0, 2]])
    assert impatient.now > measure._PATIENCE_S


def test_a_directory_that_rank_0_cannot_write_blames_no_other(
    tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace
) -> None:
    others(rank=2, gathered=([None, None, None, 3],))
    assert measure.storage(places(tmp_path), info(2, 4), 1)[0] == []
    assert impatient.now == 0


def test_a_node_that_cannot_read_a_directory_does_not_share_it(
    tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network storage is gone: every look there fails, and the other ranks must not wait for this one."""

    look = os.stat

    def stale(path: Any, *more: Any, **settings: Any) -> Any:
        if ".preflight" in str(path):
            raise OSError(errno.ESTALE, "Stale file handle")
        return look(path, *more, **settings)

    found = others(rank=2, gathered=([0, None, None, 3],), told=([0, 3],))
    monkeypatch.setattr(disks, "_open", stale)
    monkeypatch.setattr(os, "stat", stale)
    unseen, looked = measure.storage(places(tmp_path)[:1], info(2, 4), 1)
    assert unseen == ["run_dir"]
    assert found.gave == [None], "rank 0 need not look for a file of this node"
    assert looked[0].problem == "Stale file handle"


def test_only_the_first_rank_of_a_node_looks(
    tmp_path: Path, others: Callable[..., Others], impatient: SimpleNamespace
) -> None:
    found = others(rank=1, gathered=([0, None],), told=([0],))
    assert measure.storage(places(tmp_path), info(1, 2, local_rank=1), 1) == ([], [])
    assert found.gave == [None]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("waited", [[0.0, 0.0, 0.0], [1.0, 0.5, 9.0]])
def test_products_do_not_count_the_time_without_a_core(waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the first loads the library. The last took 4 s, of which the kernel cannot have withheld 9."""
    taken = iter([30.0, 2.0, 1.0, 4.0])
    seen: list[int] = []

    def timed(action: Callable[[], object], device: torch.device) -> float:
        seen.append(torch.get_num_threads())
        return next(taken)

    def kernel() -> Iterator[float]:
        total = 7.0
        for each in waited:
            yield total
            total += each
            yield total

    monkeypatch.setattr(measure, "_timed", timed)
    monkeypatch.setattr(measure, "_waited_s", partial(next, kernel()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = measure.gemm_times(CPU, seconds=7.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 4
    if any(waited):
        assert found == measure.GemmTimes(mean_s=1.5 / 3, median_s=0.5, worst_s=1.0, waited=5.5 / 7)
    else:
        assert found == measure.GemmTimes(mean_s=7 / 3, median_s=2.0, worst_s=4.0, waited=0.0)


@pytest.mark.parametrize(("text", "expected"), [("12 2500000000 3\n", 2.5), ("12\n", 0.0), ("a b c\n", 0.0), ("", 0.0)])
def test_the_kernel_tells_how_long_a_thread_waited(
    text: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schedstat").write_text(text)
    asked: list[str] = []

    def redirected(path: str) -> Path:
        asked.append(path)
        return tmp_path / "schedstat"

    monkeypatch.setattr(measure, "Path", redirected)
    assert measure._waited_s() == expected
    (tmp_path / "schedstat").unlink()
    assert measure._waited_s() == 0.0
    assert asked == ["/proc/thread-self/schedstat"] * 2


def test_bandwidth_is_the_bytes_of_a_rank_over_the_time(
    others: Callable[..., Others], monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 MiB in fours, cut to a multiple of the ranks; groups are made and gone in the same order on every rank."""
    found = others()
    sizes: list[int] = []

    def best(action: Any, agree: Any, device: torch.device) -> float:
        assert (agree.func, agree.keywords["op"]) == (found.all_reduce, torch.distributed.ReduceOp.MAX)
        assert action.keywords["group"] == agree.keywords["group"]
        exchange = action.func == found.all_to_all_single
        if exchange:
            received, sent = action.args
            assert received.data_ptr() != sent.data_ptr()
            assert received.shape == sent.shape
        sizes.append(action.args[0].numel())
        return 0.5 if exchange else 0.25

    monkeypatch.setattr(measure, "_best", best)
    layout = ParallelLayout.resolve(tp=1, pp=5, vpp=1, cp=1, ep=1, etp=1, dp=3)
    result = measure.bandwidth(layout, info(4, 15), CPU, 3, 60)
    in_threes, in_fives = 786_432, 786_430
    assert sizes == [in_threes, in_threes, in_fives, in_fives]
    assert result == {
        "dp": (3, pytest.approx(4 * in_threes / 0.25e9), pytest.approx(4 * in_threes / 0.5e9)),
        "pp": (1, pytest.approx(4 * in_fives / 0.25e9), pytest.approx(4 * in_fives / 0.5e9)),
    }
    dp, pp = (3, 4, 5), (1, 4, 7, 10, 13)
    assert found.groups == [("new", *dp), ("gone", *dp), ("new", *pp), ("gone", *pp)]


def test_groups_of_context_parallel_ranks() -> None:
    layout = ParallelLayout.resolve(tp=2, pp=1, vpp=1, cp=2, ep=4, etp=1, dp=2)
    assert measure.groups_of(layout, 3) == {"tp": [2, 3], "cp": [1, 3], "dp": [3, 7], "ep": [0, 1, 2, 3]}


def pairs(nodes: list[str], others: Callable[..., Others], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[object]]:
    """What each rank does in the two rounds: the rank that it exchanges with or None; then what `links` returns."""
    done: dict[int, list[object]] = {}
    for rank in range(len(nodes)):
        found, mine = others(rank=rank), list[object]()

        def best(
            action: Any, agree: Any, device: torch.device,
            found: Others = found, mine: list[object] = mine, rank: int = rank,
        ) -> float:  # fmt: skip
            message, own, other = action.args
            assert (action.func, own, agree.func) == (measure._swap, rank, measure._larger)
            assert agree.keywords == {"pair": (own, other)}
            assert message.nbytes == 2 << 20
            mine += [None] * (found.barriers - 1 - len(mine)) + [other]
            return 0.5 / len(mine)

        monkeypatch.setattr(measure, "_best", best)
        result = measure.links(nodes, info(rank, len(nodes)), CPU, 2)
        assert found.barriers == 2, "as on every other rank"
        done[rank] = [*mine, *[None] * (2 - len(mine)), result]
    return done


def test_each_node_measures_with_both_of_its_neighbours(
    others: Callable[..., Others], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round the ring where nodes are even in number. Both directions count, of the better round."""
    first, second = 2 * (2 << 20) / 0.5e9, 2 * (2 << 20) / 0.25e9
    four = pairs(["a", "a", "b", "c", "c", "d"], others, monkeypatch)
    assert four == {
        0: [2, 5, second], 1: [None, None, None], 2: [0, 3, second], 3: [5, 2, second], 4: [None, None, None],
        5: [3, 0, second],
    }  # fmt: skip
    three = pairs(["a", "b", "c"], others, monkeypatch)
    assert three == {0: [1, None, first], 1: [0, 2, second], 2: [None, 1, second]}
    two = pairs(["a", "b"], others, monkeypatch)
    assert two == {0: [1, 1, second], 1: [0, 0, second]}
    assert pairs(["a", "a"], others, monkeypatch) == {0: [None] * 3, 1: [None] * 3}


class Send:
    """Both kinds of operation of `exchange`."""

    def __init__(self, kind: str, tensor: torch.Tensor, peer: int) -> None:
        self.kind, self.tensor, self.peer = kind, tensor, peer


@pytest.mark.parametrize("rank", [0, 1])
def test_the_longer_time_of_a_pair_counts_for_both(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower rank sends first, and the other one receives first: neither waits for itself."""
    times = torch.tensor([0.2]), torch.tensor([0.7])

    def exchange(operations: list[Send]) -> list[SimpleNamespace]:
        assert [one.kind for one in operations] == [["send", "receive"], ["receive", "send"]][rank]
        assert {one.peer for one in operations} == {1 - rank}
        (received,) = (one.tensor for one in operations if one.kind == "receive")
        (sent,) = (one.tensor for one in operations if one.kind == "send")
        assert torch.equal(sent, times[rank])
        return [SimpleNamespace(wait=lambda: received.copy_(times[1 - rank]))]

    fake = SimpleNamespace(P2POp=Send, isend="send", irecv="receive", batch_isend_irecv=exchange)
    monkeypatch.setattr(measure, "dist", fake)
    value = times[rank].clone()
    measure._larger(value, (rank, 1 - rank))
    assert torch.equal(value, torch.tensor([0.7]))
    measure._swap(times[rank].clone(), rank, 1 - rank)


@pytest.mark.parametrize(
    ("own", "longest", "rounds"),
    [(0.0499, 0.0499, 6), (0.2, 0.2, 3), (5.0, 5.0, 3), (1e-9, 1e-9, 50), (0.0, 0.0, 50), (0.01, 0.1, 3)],
)
def test_a_quick_collective_is_repeated_as_often_on_every_rank(
    own: float, longest: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as the slowest of them can in 0.3 s. The fastest counts, in whichever call."""
    for fastest in {0, 1, rounds - 1}:
        times = [own + 1e-12 * (number != fastest) for number in range(rounds)]
        left = iter(times)
        monkeypatch.setattr(measure, "_timed", lambda action, device, left=left: next(left))
        best = measure._best(lambda: None, lambda value: value.fill_(longest), CPU)
        assert best == pytest.approx(min(times), abs=1e-13)
        assert list(left) == []


def test_a_time_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=3.0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert measure._timed(lambda: setattr(clock, "now", clock.now + 1.25), CPU) == 1.25
