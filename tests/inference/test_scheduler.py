"""Continuous batching without a model: every token is computed once it is known, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest

from moe_train.inference.blocks import BlockPool
from moe_train.inference.scheduler import Batch, BatchEntry, Scheduler, SequenceState, SequenceTooLong

SIZE = 4


def next_token(tokens: list[int]) -> int:
    """What a model would add: a function of all tokens so far."""
    return hash(tuple(tokens)) % 7


def verified(entry: BatchEntry) -> list[int]:
    """The tokens that follow, up to the first that is not the draft."""
    new: list[int] = []
    for draft in (*entry.tokens[entry.known - entry.start :], None):
        new.append(next_token([*entry.sequence.tokens, *new]))
        if new[-1] != draft:
            break
    return new


def finish(scheduler: Scheduler, batch: Batch) -> None:
    """Complete a forward pass of `next_token`, and remove the sequences that have all their tokens."""
    scheduler.complete(batch, {e.sequence: verified(e) for e in batch.entries if e.samples})
    for entry in batch.entries:
        if entry.sequence.num_new_tokens == entry.sequence.max_new_tokens:
            scheduler.remove(entry.sequence)


def step(scheduler: Scheduler) -> Batch:
    """One forward pass."""
    batch = scheduler.schedule()
    finish(scheduler, batch)
    return batch


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def spans(batch: Batch) -> list[tuple[int, int, int]]:
    return [(entry.sequence.arrival, entry.start, entry.end) for entry in batch.entries]


def test_a_prompt_is_computed_next_to_sequences_that_decode() -> None:
    scheduler = Scheduler(BlockPool(16, SIZE), max_batch_tokens=8, max_sequences=4)
    scheduler.add(SequenceState((1, 2, 3), 4))
    assert spans(step(scheduler)) == [(0, 0, 3)]
    scheduler.add(SequenceState(tuple(range(10, 20)), 2))
    assert spans(step(scheduler)) == [(0, 3, 4), (1, 0, 7)]  # the budget is 8
    assert spans(step(scheduler)) == [(0, 4, 5), (1, 7, 10)]
    assert spans(step(scheduler)) == [(0, 5, 6), (1, 10, 11)]
    assert scheduler.is_idle


def test_no_more_sequences_run_than_are_allowed() -> None:
    scheduler = Scheduler(BlockPool(16, SIZE), max_batch_tokens=8, max_sequences=2)
    for first in range(3):
        scheduler.add(SequenceState((first,), 2))
    assert spans(step(scheduler)) == [(0, 0, 1), (1, 0, 1)]
    step(scheduler)
    assert spans(step(scheduler)) == [(2, 0, 1)]


def test_the_sequence_that_arrived_last_is_evicted_and_computed_again() -> None:
    pool = BlockPool(3, SIZE)
    scheduler = Scheduler(pool, max_batch_tokens=16, max_sequences=4)
    first, second = SequenceState((1, 2, 3, 4), 6), SequenceState((5, 6, 7), 4)
    scheduler.add(first)
    scheduler.add(second)
    assert spans(step(scheduler)) == [(0, 0, 4), (1, 0, 3)]
    assert spans(step(scheduler)) == [(0, 4, 5), (1, 3, 4)]
    while second.evictions == 0:
        step(scheduler)
    assert scheduler.waiting == (second,)
    while not scheduler.is_idle:
        step(scheduler)
    assert (first.evictions, second.evictions) == (0, 1)
    assert first.new_tokens == expected(first.prompt, 6)
    assert second.new_tokens == expected(second.prompt, 4)
    assert pool.available == 3


def test_further_completions_share_the_blocks_of_the_prompt() -> None:
    pool = BlockPool(8, SIZE)
    scheduler = Scheduler(pool, max_batch_tokens=16, max_sequences=4)
    parent = SequenceState((1, 2, 3, 4, 5, 6), 3)
    child = SequenceState(parent.prompt, 3, parent)
    scheduler.add(parent)
    scheduler.add(child)
    assert spans(step(scheduler)) == [(0, 0, 6)]
    batch = step(scheduler)
    assert spans(batch) == [(0, 6, 7), (1, 5, 6)]
    assert len(batch.copies) == 1
    assert parent.table is not None
    assert child.table is not None
    assert parent.table.blocks[0] == child.table.blocks[0]
    assert parent.table.blocks[1] != child.table.blocks[1]
    assert pool.in_use == 3


def test_a_cancelled_sequence_leaves_no_block_behind() -> None:
    pool = BlockPool(8, SIZE)
    scheduler = Scheduler(pool, max_batch_tokens=4, max_sequences=1)
    running, waiting = SequenceState((1, 2, 3, 4, 5, 6), 3), SequenceState((1,), 3)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)  # once more is harmless
    assert scheduler.is_idle
    assert pool.available == 8


def test_a_sequence_that_never_fits_is_refused() -> None:
    scheduler = Scheduler(BlockPool(2, SIZE), max_batch_tokens=4, max_sequences=1)
    scheduler.add(SequenceState((1,) * 5, 4))
    with pytest.raises(SequenceTooLong, match="9 tokens do not fit into a KV cache of 8 tokens"):
        scheduler.add(SequenceState((1,) * 5, 5))


def test_drafts_are_computed_with_the_last_known_token() -> None:
    scheduler = Scheduler(BlockPool(8, SIZE), max_batch_tokens=16, max_sequences=4)
    sequence = SequenceState((1, 2, 3), 6)
    scheduler.add(sequence)
    step(scheduler)
    wanted = expected(sequence.prompt, 6)
    sequence.draft = [wanted[1], wanted[2], wanted[3] + 1]
    assert spans(step(scheduler)) == [(0, 3, 7)]
    assert sequence.new_tokens == wanted[:4]
    assert sequence.num_cached == 3 + 3  # of the drafts, the two that were right
    sequence.draft = [wanted[4], wanted[5], 0, 0]
    assert spans(step(scheduler)) == [(0, 6, 8)]  # not more than the tokens that are wanted
    assert sequence.new_tokens == wanted
    assert scheduler.is_idle


def test_sequences_in_flight_wait_for_their_token() -> None:
    scheduler = Scheduler(BlockPool(8, SIZE), max_batch_tokens=16, max_sequences=4, max_in_flight=2)
    for first in range(3):
        scheduler.add(SequenceState((first,), 2))
    batches = [scheduler.schedule() for _ in range(3)]
    assert [spans(batch) for batch in batches] == [[(0, 0, 1), (1, 0, 1)], [(2, 0, 1)], []]
    finish(scheduler, batches[0])
    assert spans(scheduler.schedule()) == [(0, 1, 2), (1, 1, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_random_arrivals_cancellations_and_evictions_change_no_token(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(draw.randint(6, 12), SIZE)
    budget, depth = draw.choice([3, 8, 32]), draw.randint(1, 3)
    scheduler = Scheduler(pool, budget, max_sequences=draw.randint(1, 6), max_in_flight=depth)
    sequences: list[SequenceState] = []
    cancelled: set[SequenceState] = set()
    in_flight: list[Batch] = []

    def advance() -> None:
        batch = scheduler.schedule()
        assert batch.num_tokens <= budget
        assert batch.num_tokens or in_flight or scheduler.is_idle
        for entry in batch.entries:
            assert len(entry.blocks) * SIZE >= entry.end > entry.start
            assert not any(entry.sequence is other.sequence for earlier in in_flight for other in earlier.entries)
        in_flight.append(batch)
        if len(in_flight) == depth or not batch.entries:
            finish(scheduler, in_flight.pop(0))
        for sequence in scheduler.running:  # guesses, of which half are right
            if draw.random() < 0.3 and not any(sequence is e.sequence for b in in_flight for e in b.entries):
                sequence.draft = [token + draw.randint(0, 1) for token in expected(tuple(sequence.tokens), 2)]

    for _ in range(300):
        if draw.random() < 0.3 and len(sequences) < 25:
            prompt = tuple(draw.randrange(2) for _ in range(draw.randint(1, 14)))
            parent = None
            for _ in range(draw.choice([1, 1, 3])):
                sequences.append(SequenceState(prompt, draw.randint(1, 10), parent))
                parent = parent or sequences[-1]
                scheduler.add(sequences[-1])
        if sequences and draw.random() < 0.02:
            cancelled.add(draw.choice(sequences))
            for sequence in cancelled:
                scheduler.remove(sequence)
        advance()
    while not scheduler.is_idle:
        advance()
    assert pool.available == pool.num_blocks
    for sequence in set(sequences) - cancelled:
        assert sequence.new_tokens == expected(sequence.prompt, sequence.max_new_tokens)
