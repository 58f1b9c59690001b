"""Continuous batching: which tokens of which sequences the next forward pass computes. No torch import.

As in Orca (OSDI 2022) and vLLM: sequences join and leave between forward passes, and prompts are computed in chunks
next to sequences that decode (chunked prefill). A sequence that finds no free block evicts the sequence that arrived
last, whose tokens are computed again later. All is deterministic: ranks with the same requests make the same batches.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_train.inference.blocks import BlockCopy, BlockPool, BlockTable


class SequenceTooLong(ValueError):
    """A sequence would not fit into the cache even if it were alone."""


@dataclass(eq=False)
class SequenceState:
    """One sequence: a prompt and what follows it.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: limit of the tokens that follow the prompt.
        parent: a sequence with the same prompt. This one shares the blocks of the prompt with it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    parent: SequenceState | None = None
    tokens: list[int] = field(init=False)
    """The prompt and the tokens that were generated so far."""
    arrival: int = field(init=False, default=-1)
    table: BlockTable | None = field(init=False, default=None)
    """Its blocks while it is running."""
    evictions: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """Those that were generated."""
        return self.tokens[len(self.prompt) :]

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.table.num_tokens if self.table is not None else 0


@dataclass(frozen=True)
class BatchEntry:
    """Tokens `[start, end)` of a sequence, all of whose earlier tokens are in the cache."""

    sequence: SequenceState
    start: int
    end: int
    blocks: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence in the forward pass."""
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether the logits of the last token are needed, because it is the last that is known."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Batch:
    """One forward pass. The copies come first, in their order."""

    entries: tuple[BatchEntry, ...]
    copies: tuple[BlockCopy, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(entry.num_tokens for entry in self.entries)


class Scheduler:
    """First come, first served, within a budget of tokens for each forward pass.

    Args:
        max_batch_tokens: tokens of one forward pass, over all sequences.
        max_sequences: sequences that run at the same time.
    """

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int) -> None:
        if max_batch_tokens < 1 or max_sequences < 1:
            raise ValueError(f"{max_batch_tokens=} and {max_sequences=} are to be at least 1")
        self._pool = pool
        self._max_batch_tokens, self._max_sequences = max_batch_tokens, max_sequences
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []  # by arrival
        self._arrivals = 0

    @property
    def waiting(self) -> tuple[SequenceState, ...]:
        """Sequences that have no blocks, in the order in which they will get some."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[SequenceState, ...]:
        """Sequences that have blocks, by arrival."""
        return tuple(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left."""
        return not self._waiting and not self._running

    def add(self, sequence: SequenceState) -> None:
        """Have a new sequence wait for its turn.

        Raises:
            SequenceTooLong: prompt and continuation do not fit into the cache.
        """
        length = len(sequence.prompt) + sequence.max_new_tokens - 1  # the last token is never computed
        if self._pool.blocks_for(length) > self._pool.num_blocks:
            capacity = self._pool.num_blocks * self._pool.block_size
            raise SequenceTooLong(f"{length} tokens do not fit into a KV cache of {capacity} tokens")
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence that has ended or was cancelled, and release its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def schedule(self) -> Batch:
        """The next forward pass. It is empty only if no sequence is left."""
        entries: list[BatchEntry] = []
        copies: list[BlockCopy] = []
        budget, evicted = self._max_batch_tokens, False
        for sequence in self.running:
            if budget and sequence.table is not None:  # an earlier one in this loop may have evicted it
                count = min(budget, len(sequence.tokens) - sequence.num_cached)
                evicted |= self._make_room(sequence, count)
                if sequence.table is not None:
                    budget -= self._enter(sequence, count, entries, copies)
        while self._waiting and budget and not evicted and len(self._running) < self._max_sequences:
            if not self._admit(self._waiting[0]):
                break
            sequence = self._waiting.popleft()
            insort(self._running, sequence, key=lambda other: other.arrival)
            count = min(budget, len(sequence.tokens) - sequence.num_cached)
            budget -= self._enter(sequence, count, entries, copies)
        return Batch(tuple(entries), tuple(copies))

    def complete(self, batch: Batch, tokens: Mapping[SequenceState, int]) -> None:
        """Note that a forward pass was done, and append the token that was sampled for each entry that `samples`."""
        for entry in batch.entries:
            sequence, samples = entry.sequence, entry.samples
            if sequence.table is not None:
                sequence.table.append(sequence.tokens[: entry.end], entry.start)
                if samples:
                    sequence.tokens.append(tokens[sequence])

    def _enter(self, sequence: SequenceState, count: int, entries: list[BatchEntry], copies: list[BlockCopy]) -> int:
        """Put `count` tokens of a sequence, for which there is room, into the batch. Returns `count`."""
        table = sequence.table
        assert table is not None
        copies += table.reserve(count)
        entries.append(BatchEntry(sequence, table.num_tokens, table.num_tokens + count, table.blocks))
        return count

    def _make_room(self, sequence: SequenceState, count: int) -> bool:
        """Evict sequences that arrived last until `count` more tokens fit, if need be the sequence itself."""
        evicted = False
        while sequence.table is not None and sequence.table.blocks_to_reserve(count) > self._pool.available:
            self._evict(self._running[-1])
            evicted = True
        return evicted

    def _evict(self, sequence: SequenceState) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.evictions += 1
        position = next(
            (i for i, other in enumerate(self._waiting) if other.arrival > sequence.arrival), len(self._waiting)
        )
        self._waiting.insert(position, sequence)

    def _admit(self, sequence: SequenceState) -> bool:
        """Give a sequence its table if all its tokens fit, so that it is not evicted while its prompt is computed."""
        table = self._shared_prompt(sequence)
        if table is None:
            return False
        if table.blocks_to_reserve(len(sequence.tokens) - table.num_tokens) > self._pool.available:
            table.release()
            return False
        sequence.table = table
        return True

    def _shared_prompt(self, sequence: SequenceState) -> BlockTable | None:
        """A table with the blocks of a prefix that are known already; None while the parent computes the prompt."""
        parent = sequence.parent
        if parent is not None and parent.table is not None:
            if parent.num_cached < len(sequence.prompt):
                return None
            if len(sequence.tokens) == len(sequence.prompt):
                return parent.table.fork(len(sequence.prompt) - 1)
        return BlockTable.with_prefix(self._pool, sequence.tokens)

    def _release(self, sequence: SequenceState) -> None:
        if sequence.table is not None:
            sequence.table.release()
            sequence.table = None
