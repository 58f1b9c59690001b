"""Continuous batching: which tokens of which sequences the next forward pass computes. No torch import.

As in Orca (OSDI 2022) and vLLM: sequences join and leave between forward passes, and prompts are computed in chunks
next to sequences that decode (chunked prefill). A sequence that finds no free block evicts the sequence that arrived
last, whose tokens are computed again later. All is deterministic: ranks with the same requests make the same batches.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_train.inference.blocks import BlockCopy, BlockPool, BlockTable


class SequenceTooLong(ValueError):
    """A sequence would not fit into the cache even if it were alone."""


@dataclass(eq=False)
class SequenceState:
    """One sequence: a prompt and what follows it.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: limit of the tokens that follow the prompt; 0 only computes the prompt.
        parent: a sequence with the same prompt. This one shares the blocks of the prompt with it.
        needs_prompt_logits: whether the whole prompt is computed, and logits of all its positions are wanted.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    parent: SequenceState | None = None
    needs_prompt_logits: bool = False
    tokens: list[int] = field(init=False)
    """The prompt and the tokens that were generated so far."""
    arrival: int = field(init=False, default=-1)
    table: BlockTable | None = field(init=False, default=None)
    """Its blocks while it is running."""
    draft: list[int] = field(init=False, default_factory=list)
    """Guesses of the tokens that follow, which the next forward pass verifies."""
    evictions: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """Those that were generated."""
        return self.tokens[len(self.prompt) :]

    @property
    def num_new_tokens(self) -> int:
        """How many were generated."""
        return len(self.tokens) - len(self.prompt)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.table.num_tokens if self.table is not None else 0


@dataclass(frozen=True, eq=False)
class BatchEntry:
    """Tokens `[start, end)` of a sequence, all of whose earlier tokens are in the cache.

    Args:
        known: number of tokens of the sequence. Those from there on are drafts.
        tokens: the tokens themselves.
        scored: whether logits of all positions of the prompt are wanted.
    """

    sequence: SequenceState
    start: int
    end: int
    known: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    scored: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence in the forward pass."""
        return self.end - self.start

    @property
    def decodes(self) -> bool:
        """Whether the pass computes one known token, and drafts behind it."""
        return self.end >= self.known == self.start + 1

    @property
    def drafts(self) -> tuple[int, ...]:
        """Its last tokens, those that the pass verifies."""
        return self.tokens[self.known - self.start :]

    def num_right(self, chosen: Sequence[int]) -> int:
        """Drafts before the first wrong one. `chosen`: tokens that the model chooses from the last known one on."""
        return next((i for i, draft in enumerate(self.drafts) if chosen[i] != draft), len(self.drafts))

    @property
    def samples(self) -> bool:
        """Whether the pass computes the last token that is known, whose logits give the next one."""
        return self.end >= self.known and self.sequence.max_new_tokens > 0

    @property
    def scored_positions(self) -> range:
        """Positions whose logits are wanted, because they predict a token of the prompt that is to be scored."""
        if not self.scored:
            return range(0)
        return range(self.start, min(self.end, len(self.sequence.prompt) - 1))

    @property
    def sampled_positions(self) -> range:
        """Positions whose logits predict tokens that follow the known ones: the last known token, and the drafts."""
        return range(self.known - 1, self.end) if self.samples else range(0)


@dataclass(frozen=True)
class Batch:
    """One forward pass. The copies come first, in their order. Of the entries, those that decode come first, by the
    number of their drafts."""

    entries: tuple[BatchEntry, ...]
    copies: tuple[BlockCopy, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def num_rows(self) -> int:
        """Logits that are wanted."""
        return sum(len(entry.scored_positions) + len(entry.sampled_positions) for entry in self.entries)


class Scheduler:
    """First come, first served, within a budget of tokens for each forward pass.

    Args:
        max_batch_tokens: tokens of one forward pass, over all sequences.
        max_sequences: sequences that run at the same time.
        max_in_flight: forward passes that can be under way at the same time, with different sequences: the pipeline
            stages that are to be kept busy.
    """

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, max_in_flight: int = 1) -> None:
        if min(max_batch_tokens, max_sequences, max_in_flight) < 1:
            raise ValueError(f"{max_batch_tokens=}, {max_sequences=} and {max_in_flight=} are to be at least 1")
        self.pool = pool
        self._max_batch_tokens, self._max_sequences = max_batch_tokens, max_sequences
        self._max_in_flight = max_in_flight
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []  # by arrival
        self._in_flight: set[SequenceState] = set()
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
    def num_sequences(self) -> int:
        """Those that have not ended."""
        return len(self._waiting) + len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left."""
        return not self.num_sequences

    def add(self, sequence: SequenceState) -> None:
        """Have a new sequence wait for its turn.

        Raises:
            SequenceTooLong: prompt and continuation do not fit into the cache.
        """
        length = len(sequence.prompt) + max(sequence.max_new_tokens - 1, 0)  # the last token is never computed
        if self.pool.blocks_for(length) > self.pool.num_blocks:
            capacity = self.pool.num_blocks * self.pool.block_size
            raise SequenceTooLong(f"{length} tokens do not fit into a KV cache of {capacity} tokens")
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence that has ended or was cancelled, and release its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._in_flight.discard(sequence)
            self._release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def schedule(self) -> Batch:
        """The next forward pass. It is empty only if no sequence is left, or those that are left are in flight."""
        entries: list[BatchEntry] = []
        copies: list[BlockCopy] = []
        budget, evicted = self._max_batch_tokens, False
        places = -(-min(self.num_sequences, self._max_sequences) // self._max_in_flight)
        for sequence in self.running:
            # An earlier one in this loop may have evicted it.
            if budget and len(entries) < places and sequence.table is not None and sequence not in self._in_flight:
                count = self._next_count(sequence, budget)
                evicted |= self._make_room(sequence, count)
                if sequence.table is not None and sequence.table.blocks_to_reserve(count) <= self.pool.available:
                    budget -= self._enter(sequence, count, entries, copies)
        while self._waiting and budget and not evicted and len(entries) < places:
            if len(self._running) >= self._max_sequences or not self._admit(self._waiting[0]):
                break
            sequence = self._waiting.popleft()
            insort(self._running, sequence, key=lambda other: other.arrival)
            budget -= self._enter(sequence, self._next_count(sequence, budget), entries, copies)
        entries.sort(key=lambda entry: entry.num_tokens if entry.decodes else self._max_batch_tokens + 1)
        self._in_flight.update(entry.sequence for entry in entries)
        return Batch(tuple(entries), tuple(copies))

    def complete(self, batch: Batch, tokens: Mapping[SequenceState, Sequence[int]]) -> None:
        """Note that a forward pass was done, and append the tokens that it has added to each entry that `samples`."""
        for entry in batch.entries:
            sequence = entry.sequence
            if sequence not in self._in_flight:  # removed meanwhile
                continue
            self._in_flight.remove(sequence)
            assert sequence.table is not None
            new, cached = tokens.get(sequence, ()), entry.end
            if entry.samples:
                sequence.tokens += new
                cached = entry.known + max(len(new) - 1, 0)  # nobody has computed the last one yet
            sequence.draft = []
            sequence.table.append(sequence.tokens, entry.start, cached)

    def _next_count(self, sequence: SequenceState, budget: int) -> int:
        """Tokens of a sequence to compute next: those that are known, and the drafts once all of them are."""
        missing = len(sequence.tokens) - sequence.num_cached
        if missing > budget:
            return budget
        wanted = sequence.max_new_tokens - sequence.num_new_tokens - 1
        return missing + max(min(len(sequence.draft), wanted, budget - missing), 0)

    def _enter(self, sequence: SequenceState, count: int, entries: list[BatchEntry], copies: list[BlockCopy]) -> int:
        """Put `count` tokens of a sequence, for which there is room, into the batch. Returns `count`."""
        table = sequence.table
        assert table is not None
        copies += table.reserve(count)
        start, known = table.num_tokens, len(sequence.tokens)
        tokens = (*sequence.tokens[start : start + count], *sequence.draft[: max(start + count - known, 0)])
        entries.append(
            BatchEntry(sequence, start, start + count, known, tokens, table.blocks, sequence.needs_prompt_logits)
        )
        return count

    def _make_room(self, sequence: SequenceState, count: int) -> bool:
        """Evict sequences that arrived last until `count` more tokens fit, if need be the sequence itself.

        Those in flight are not evicted. While there are some, the sequence itself can wait for them.
        """
        evicted = False
        while sequence.table is not None and sequence.table.blocks_to_reserve(count) > self.pool.available:
            last = next(other for other in reversed(self._running) if other not in self._in_flight)
            if last is sequence and self._in_flight:
                break
            self._evict(last)
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
        if table.blocks_to_reserve(len(sequence.tokens) - table.num_tokens) > self.pool.available:
            table.release()
            return False
        sequence.table = table
        return True

    def _shared_prompt(self, sequence: SequenceState) -> BlockTable | None:
        """A table with the blocks of a prefix that are known already; None while the parent computes the prompt."""
        if sequence.needs_prompt_logits:
            return BlockTable(self.pool)
        parent = sequence.parent
        if parent is not None and parent.table is not None:
            if parent.num_cached < len(sequence.prompt):
                return None
            if len(sequence.tokens) == len(sequence.prompt):
                return parent.table.fork(len(sequence.prompt) - 1)
        return BlockTable.with_prefix(self.pool, sequence.tokens)

    def _release(self, sequence: SequenceState) -> None:
        sequence.draft = []
        if sequence.table is not None:
            sequence.table.release()
            sequence.table = None
