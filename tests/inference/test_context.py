"""Where attention finds the tokens of a sequence in the cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moe_train.inference.cache import PagedKVCache
from moe_train.inference.context import PagedContext, RotaryTable, longest_run
from moe_train.inference.scheduler import Batch, BatchEntry, SequenceState
from moe_train.model.local.cached_attention import Decoding, Prefill

SIZE = 4


def context(*entries: BatchEntry) -> PagedContext:
    cpu = torch.device("cpu")
    cache = PagedKVCache([], [], 64, SIZE, torch.float32, cpu)
    count = sum(entry.num_tokens for entry in entries)
    return PagedContext(Batch(entries, ()), cache, RotaryTable(torch.float32), cpu, count)


def entry(start: int, end: int, blocks: tuple[int, ...]) -> BatchEntry:
    sequence = SequenceState(tuple(range(start + 1)), 99)
    return BatchEntry(sequence, start, end, start + 1, tuple(range(start, end)), blocks)


def numbers(slots: Any) -> list[int]:
    return list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()


@pytest.mark.parametrize("start", [9, 10, 11])
def test_the_last_tokens_are_neighbours_wherever_the_blocks_are(start: int) -> None:
    """Three tokens, in the last block or in the last two."""
    for blocks in itertools.permutations((3, 4, 5, 9)):
        end = start + 3
        (part,) = context(entry(start, end, blocks)).parts
        assert isinstance(part, Decoding)
        (pieces,) = part.pieces
        places = [place for slots in pieces.slots for place in numbers(slots)]
        in_order = [block * SIZE + i for block in blocks[: -(-end // SIZE)] for i in range(SIZE)]
        assert sorted(places) == sorted(in_order)
        assert pieces.unused == len(in_order) - end
        assert places[len(places) - pieces.unused - 3 :] == in_order[end - 3 :]


def test_sequences_with_equally_many_tokens_are_decoded_together() -> None:
    entries = [entry(5, 6, (1, 2)), entry(9, 10, (3, 4, 5)), entry(6, 8, (6, 7)), entry(7, 9, (8, 9, 10))]
    prompt = BatchEntry(SequenceState(tuple(range(8)), 9), 0, 8, 8, tuple(range(8)), (11, 12))
    one, two, last = context(*entries, prompt).parts
    assert isinstance(one, Decoding)
    assert isinstance(two, Decoding)
    assert [(part.rows, part.queries) for part in (one, two)] == [(slice(0, 2), 1), (slice(2, 6), 2)]
    assert isinstance(last, Prefill)
    assert last.rows == slice(6, 14)
    assert two.gathered is not None
    seen = two.gathered.mask == 0
    assert seen.sum(dim=-1).tolist() == [[7, 8], [8, 9]]
    slots = two.gathered.slots
    assert slots[1].tolist() == [block * SIZE + i for block in (8, 9, 10) for i in range(SIZE)]


def test_the_longest_run_of_consecutive_blocks_is_found() -> None:
    assert longest_run((7, 1, 2, 3, 8, 9)) == (1, 3)
    assert longest_run((2, 1)) == (0, 1)
