from __future__ import annotations

import weakref

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from moe_train.data.iterator import Batch, BatchIterator
from moe_train.schedules import BatchSchedule, BatchSegment


class Numbered(Dataset[Batch]):
    """Sample i is [i, i + 1, i + 2]."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        tokens = torch.arange(index, index + 3)
        return {"tokens": tokens, "loss_mask": torch.ones(3)}


def iterator(
    dp_rank: int = 0, dp_size: int = 1, micro: int = 1, size: int = 8, count: int = 50, **others: int
) -> BatchIterator:
    return BatchIterator(
        Numbered(count),
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro,
        schedule=BatchSchedule.constant(size),
        **others,
    )


def global_batches(dp_size: int, micro: int, size: int = 8, start: int = 0, count: int = 50) -> list[list[int]]:
    """First tokens of every sample of each global batch, over all ranks, in the order that one rank would see."""
    ranks = [iterator(r, dp_size, micro, size, count, start_sample=start) for r in range(dp_size)]
    batches = []
    for first in ranks[0]:
        parts = [first, *(next(other) for other in ranks[1:])]
        for _ in range(size // (micro * dp_size) - 1):
            parts += [next(rank) for rank in ranks]
        batches.append([int(row[0]) for part in parts for row in part["tokens"]])
    assert all(next(other, None) is None for other in ranks), "all ranks end at the same step"
    return batches


def test_chunks_of_a_rank_share_one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when one is a global batch ahead, and after the run went back."""
    read: list[int] = []
    take = Numbered.__getitem__
    monkeypatch.setattr(Numbered, "__getitem__", lambda self, index: (read.append(index), take(self, index))[1])
    reader = iterator(micro=2, size=4)
    first, second = reader.for_chunks(2)
    ahead = [next(first)["tokens"] for _ in range(4)]
    assert read == list(range(8))
    assert [next(second)["tokens"].tolist() for _ in range(4)] == [tokens.tolist() for tokens in ahead]
    assert read == list(range(8))
    assert reader.consumed_samples == 8
    reader.load_state_dict({"consumed_samples": 4, "trained_samples": 4})
    for chunk in (second, first):
        assert next(chunk)["tokens"].tolist() == ahead[2].tolist()
    assert read == [*range(8), 4, 5]


@pytest.mark.parametrize("count", [1, 2])
def test_micro_batches_that_every_chunk_has_taken_are_freed(count: int) -> None:
    chunks = iterator(count=200).for_chunks(count)
    taken: list[weakref.ref[torch.Tensor]] = []
    for _ in range(100):
        for chunk in chunks:
            taken.append(weakref.ref(next(chunk)["tokens"]))
    assert sum(tensor() is not None for tensor in taken) <= count


def test_micro_batches_are_stacked_samples() -> None:
    batch = next(iterator(micro=2))
    assert batch["tokens"].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert batch["tokens"].dtype == torch.int64
    assert batch["loss_mask"].shape == (2, 3)


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 4), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_every_layout_sees_the_same_global_batches_in_order(dp_size: int, micro: int) -> None:
    assert global_batches(dp_size, micro) == [list(range(k * 8, k * 8 + 8)) for k in range(6)]


RAMP = BatchSchedule([BatchSegment(0, 4), BatchSegment(8, 8), BatchSegment(24, 16)])


@pytest.mark.parametrize(("dp_size", "micro", "workers"), [(1, 1, 0), (2, 2, 0), (4, 1, 0), (2, 1, 1)])
def test_batches_grow_as_the_schedule_says_in_every_layout(dp_size: int, micro: int, workers: int) -> None:
    """Each sample is used once, in order, and any rank can continue from the end of any global batch."""
    options = {"micro_batch_size": micro, "dp_size": dp_size, "schedule": RAMP, "workers": workers}
    ranks = [BatchIterator(Numbered(60), dp_rank=rank, **options) for rank in range(dp_size)]  # type: ignore[arg-type]
    sizes, used = [], []
    while True:
        state = ranks[0].state_dict()
        size = RAMP.size_at(state["trained_samples"])
        if state["consumed_samples"] + size > 60:
            break
        rows = [next(rank)["tokens"][:, 0].tolist() for _ in range(size // (micro * dp_size)) for rank in ranks]
        sizes.append(size)
        used += [sample for row in rows for sample in row]
        other = BatchIterator(Numbered(60), dp_rank=0, **options)  # type: ignore[arg-type]
        other.load_state_dict(ranks[0].state_dict())
        following = next(other, None)
        assert (None if following is None else int(following["tokens"][0, 0])) == (
            len(used) if len(used) < 56 else None
        )
        other.close()
    for rank in ranks:
        assert next(rank, None) is None
        rank.close()
    assert sizes == [4, 4, 8, 8, 16, 16]
    assert used == list(range(56))


def test_samples_that_were_not_trained_do_not_move_the_schedule() -> None:
    one = BatchIterator(Numbered(60), dp_rank=0, dp_size=1, micro_batch_size=4, schedule=RAMP, start_sample=20)
    assert [int(next(one)["tokens"][0, 0]) for _ in range(4)] == [20, 24, 28, 32]
    assert one.state_dict() == {"consumed_samples": 36, "trained_samples": 16}


def test_ranks_share_no_sample() -> None:
    taken = [[int(row[0]) for batch in iterator(r, 4, 1) for row in batch["tokens"]] for r in range(4)]
    assert sorted(sample for rank in taken for sample in rank) == list(range(48))


def test_it_goes_on_in_another_layout_and_batch_size() -> None:
    before = iterator(1, 2, 2)
    for _ in range(2 * 3):  # three steps of two micro-batches
        next(before)
    state = before.state_dict()
    assert state == {"consumed_samples": 24, "trained_samples": 24}
    assert global_batches(4, 1, start=24) == global_batches(1, 8)[3:]
    after = iterator(0, 1, 2, 4)
    next(after)
    after.load_state_dict(state)
    assert [int(next(after)["tokens"][0, 0]) for _ in range(3)] == [24, 26, 28]
    assert after.consumed_samples == 28


def test_a_position_inside_a_step_is_the_beginning_of_the_step() -> None:
    one = iterator(micro=2)
    for _ in range(5):
        next(one)
    assert one.consumed_samples == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_ahead_changes_nothing_and_leaves_no_process(workers: int) -> None:
    ahead, plain = iterator(1, 2, 2, workers=workers), iterator(1, 2, 2)
    here = psutil.Process()
    before = set(here.children())
    for _ in range(3):
        assert torch.equal(next(ahead)["tokens"], next(plain)["tokens"])
    started = set(here.children()) - before
    assert len(started) == workers
    ahead.close()
    assert not psutil.wait_procs(list(started), timeout=10)[1]
    assert ahead.consumed_samples == 8
    assert int(next(ahead)["tokens"][0, 0]) == 10, "goes on with the step that was not finished"
    ahead.close()


def test_reading_takes_no_number_from_the_generator_that_training_uses() -> None:
    state = torch.get_rng_state()
    for workers in (0, 1):
        reader = iterator(workers=workers)
        next(reader)
        reader.close()
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="8 samples are not micro-batches of 3 on 2 ranks"):
        iterator(0, 2, 3)


def test_behind_the_last_sample_comes_the_first_again_where_that_is_asked_for() -> None:
    """On every rank, with the position counted on, and without a part of a global batch left out."""
    ranks = [iterator(r, 2, micro=2, size=4, count=10, start_sample=4, wrap=True) for r in range(2)]
    batches = [[int(row[0]) for rank in ranks for row in next(rank)["tokens"]] for _ in range(4)]
    assert batches == [[4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    assert ranks[1].consumed_samples == 20
    ranks[0].load_state_dict({"consumed_samples": 9, "trained_samples": 9})
    assert [int(row[0]) for row in next(ranks[0])["tokens"]] == [9, 0]


def test_a_position_that_is_loaded_begins_with_a_whole_global_batch() -> None:
    """Also behind a batch that was left in the middle: 8 samples are 4 micro-batches of 2."""
    one = iterator(micro=2)
    for _ in range(3):
        next(one)
    assert one.consumed_samples == 0
    one.load_state_dict({"consumed_samples": 16, "trained_samples": 16})
    consumed = []
    for _ in range(8):
        next(one)
        consumed.append(one.consumed_samples)
    assert consumed == [16, 16, 16, 24, 24, 24, 24, 32]
