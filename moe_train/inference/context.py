"""What attention needs to know of a forward pass with the KV cache.

The tokens of all sequences follow one another, [t, 1, h], without padding between them. Sequences
that decode come first. A batch without sequences has tokens that only pad it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from moe_train.inference.cache import LayerCache, PagedKVCache
from moe_train.inference.scheduler import Batch, BatchEntry
from moe_train.model.local.cached_attention import Decoding, Gathered, Pieces, Prefill, Rotary, Slots

GATHERED_TOKENS = 6144
"""Up to so many tokens that decoding sequences attend to, they are copied into one tensor, so that one operation serves
all sequences. Copying more takes longer than an operation for each sequence."""


class RotaryTable:
    """Cosines and sines of the positions so far, which all layers share. It grows with the longest sequence."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._cosine, self._sine = torch.empty(0), torch.empty(0)

    def at(self, positions: Tensor, length: int, module: Any, scale: float | None, interleaved: bool) -> Rotary:
        """The angles at `positions` [t], all below `length`.

        Args:
            module: Megatron-Core's. Its `get_emb` has the angles of the whole sequence also under context parallelism,
                and keeps none of them, where each layer's `forward` would keep its own.
            scale: factor on cosine and sine; None takes that of the module.
            interleaved: whether pairs of dimensions are neighbours.
        """
        if length > len(self._cosine):
            self._compute(1 << (length - 1).bit_length(), module, scale, interleaved)
        return Rotary(self._cosine[positions], self._sine[positions], interleaved)

    def _compute(self, length: int, module: Any, scale: float | None, interleaved: bool) -> None:
        found = module.get_emb(length)
        angles, own_scale = found if isinstance(found, tuple) else (found, 1.0)
        factor = own_scale if scale is None else scale
        angles = angles.flatten(1, 2)  # [s, 1, d]: those of the first half, twice
        half = angles.size(-1) // 2
        # As upstream rounds them (models/common/embeddings/rope_utils.py, `_apply_rotary_pos_emb_bshd`).
        cosine, sine = ((x * factor).to(self._dtype)[..., :half] for x in (torch.cos(angles), torch.sin(angles)))
        join = torch.stack if interleaved else torch.cat
        self._cosine, self._sine = (
            join(parts, dim=-1).view(angles.shape) for parts in ((cosine, cosine), (-sine, sine))
        )


class PagedContext:
    """One forward pass of a batch.

    Args:
        padded_tokens: number of tokens, with those that only pad the batch.
        rotary: the table of earlier passes.
        first_samples: of each entry, only the logits of its first sampled position are wanted.
    """

    def __init__(
        self, batch: Batch, cache: PagedKVCache, rotary: RotaryTable, device: torch.device, padded_tokens: int,
        first_samples: bool = False,
    ) -> None:  # fmt: skip
        self._cache, self._table, self._device = cache, rotary, device
        self._angles: Rotary | None = None
        self.entries = batch.entries
        tokens = [token for entry in self.entries for token in entry.tokens]
        positions = [position for entry in self.entries for position in range(entry.start, entry.end)]
        self.num_tokens = len(tokens)
        padding = [0] * (padded_tokens - self.num_tokens)
        self.tokens, self.positions = (self._whole_numbers(x + padding) for x in (tokens, positions))
        self.slots = self._slots_of_all(self.entries)
        self.parts = self._parts()
        self.rows = self._whole_numbers([
            first + position - entry.start
            for first, entry in self._first_rows()
            for wanted in (entry.scored_positions, entry.sampled_positions[: 1 if first_samples else None])
            for position in wanted
        ])  # fmt: skip
        """Rows whose logits are wanted: of each entry its scored and then its sampled positions."""

    @cached_property
    def as_prefills(self) -> list[Prefill]:
        """All sequences, also those that decode, in the order of their rows."""
        return [self._prefill(first, entry) for first, entry in self._first_rows()]

    def _first_rows(self) -> list[tuple[int, BatchEntry]]:
        """Each entry with its first row."""
        return list(zip(accumulate((e.num_tokens for e in self.entries), initial=0), self.entries, strict=False))

    def _parts(self) -> list[Decoding | Prefill]:
        parts: list[Decoding | Prefill] = []
        for (queries, decodes), own in groupby(self._first_rows(), lambda item: self._kind(item[1])):
            group = list(own)
            if decodes:
                first = group[0][0]
                rows = slice(first, first + queries * len(group))
                parts.append(self._decoding(rows, queries, [entry for _, entry in group]))
            else:
                parts += [self._prefill(first, entry) for first, entry in group]
        return parts

    def _kind(self, entry: BatchEntry) -> tuple[int, bool]:
        """Number of tokens, and whether they are few and follow others, or only one."""
        few = entry.start > 0 and entry.num_tokens <= self._cache.block_size
        return entry.num_tokens, few or entry.num_tokens == 1

    def _prefill(self, first: int, entry: BatchEntry) -> Prefill:
        return Prefill(slice(first, first + entry.num_tokens), entry.end, self._prefix(entry))

    def layer(self, number: int) -> LayerCache:
        """The cache of one layer."""
        return self._cache.layer(number)

    def rotary(self, module: Any, scale: float | None, interleaved: bool) -> Rotary:
        """The angles of the tokens' positions: `RotaryTable.at`. `module` has the same settings in all layers."""
        if self._angles is None:
            length = max((entry.end for entry in self.entries), default=1)
            self._angles = self._table.at(self.positions, length, module, scale, interleaved)
        return self._angles

    def _slots_of_all(self, entries: Sequence[BatchEntry]) -> Tensor:
        """Places of the tokens of this pass."""
        size = self._cache.block_size
        return self._whole_numbers([
            entry.blocks[position // size] * size + position % size
            for entry in entries
            for position in range(entry.start, entry.end)
        ])  # fmt: skip

    def _prefix(self, entry: BatchEntry) -> Slots:
        """Places of all tokens of a sequence up to the last of this pass, in order."""
        size = self._cache.block_size
        if longest_run(entry.blocks) == (0, len(entry.blocks)):
            return slice(entry.blocks[0] * size, entry.blocks[0] * size + entry.end)
        return self._slots_of_blocks(entry.blocks)[: entry.end]

    def _decoding(self, rows: slice, queries: int, entries: Sequence[BatchEntry]) -> Decoding:
        """What sequences with `queries` tokens each attend to."""
        longest = max(entry.end for entry in entries)
        if len(entries) > 1 and len(entries) * longest <= GATHERED_TOKENS:
            return Decoding(rows, queries, self._gathered(entries, longest), [])
        later = torch.ones(queries, queries, dtype=torch.bool, device=self._device).triu_(1) if queries > 1 else None
        return Decoding(rows, queries, None, [self._pieces(entry, later) for entry in entries])

    def _gathered(self, entries: Sequence[BatchEntry], longest: int) -> Gathered:
        """Shorter sequences repeat their last block. Later positions are masked."""
        count = self._num_blocks(longest)
        blocks = [[*entry.blocks[:count], *entry.blocks[-1:] * (count - len(entry.blocks))] for entry in entries]
        slots = self._slots_of_blocks(blocks)
        positions = self._whole_numbers([range(entry.start, entry.end) for entry in entries])
        beyond = torch.arange(slots.size(1), device=self._device) > positions.unsqueeze(2)
        mask = torch.zeros(beyond.shape, dtype=self._cache.dtype, device=self._device).masked_fill_(beyond, -torch.inf)
        return Gathered(slots, mask)

    def _pieces(self, entry: BatchEntry, later: Tensor | None) -> Pieces:
        """The longest run of consecutive blocks of a sequence, and the others, if any. Its last block comes last."""
        size, blocks = self._cache.block_size, entry.blocks[: self._num_blocks(entry.end)]
        first, count = longest_run(blocks)
        unused = len(blocks) * size - entry.end
        new = len(blocks) - entry.start // size  # blocks with tokens of this pass
        run = slice(blocks[first] * size, (blocks[first] + count) * size)
        end = first + count
        if end == len(blocks):
            return Pieces([self._slots_of_blocks(blocks[:first]), run] if first else [run], unused, later)
        if first and len(blocks) - end < new:
            return Pieces([self._slots_of_blocks(blocks)], unused, later)
        return Pieces([run, self._slots_of_blocks((*blocks[:first], *blocks[end:]))], unused, later)

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self._cache.block_size)

    def _slots_of_blocks(self, blocks: Sequence[Any]) -> Tensor:
        """Places of whole blocks: block numbers [..., n] -> [..., n * block size]."""
        size = self._cache.block_size
        starts = self._whole_numbers(blocks).unsqueeze(-1) * size
        return (starts + torch.arange(size, device=self._device)).flatten(-2)

    def _whole_numbers(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def partly_filled_blocks(batch: Batch, block_size: int) -> list[int]:
    """Blocks that are new in a pass, and that it does not fill."""
    return [
        entry.blocks[entry.end // block_size]
        for entry in batch.entries
        if entry.end % block_size and entry.start <= entry.end // block_size * block_size
    ]


@lru_cache(maxsize=256)
def longest_run(blocks: tuple[int, ...]) -> tuple[int, int]:
    """(first, count) of the longest run of consecutive numbers in `blocks`, the first such run."""
    best, first = (0, 0), 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            best = max(best, (first, index - first), key=lambda run: run[1])
            first = index
    return best
