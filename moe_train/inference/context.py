"""What attention needs to know of a forward pass with the KV cache: Megatron-Core hands it on as `inference_context`.

The tokens of all sequences follow one another, [t, 1, h], without padding between them. Sequences with one token come
first: those that decode.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moe_train.inference.cache import LayerCache, PagedKVCache
from moe_train.inference.scheduler import Batch, BatchEntry
from moe_train.model.local.cached_attention import Prefill


class RotaryTable:
    """Rotary angles of the positions so far, which all layers of a model share. It grows with the longest sequence."""

    def __init__(self) -> None:
        self._angles = torch.empty(0)
        self._scale = 1.0

    def at(self, rotary: Any, positions: Tensor, length: int) -> tuple[Tensor, float]:
        """Angles [t, 1, 1, d] at `positions` [t], all below `length`, and the factor on their cosine and sine.

        Args:
            rotary: Megatron-Core's module. Its `get_emb` has the angles of the whole sequence also under context
                parallelism, and keeps none of them, where each layer's `forward` would keep its own.
        """
        if length > len(self._angles):
            found = rotary.get_emb(1 << (length - 1).bit_length())
            self._angles, self._scale = found if isinstance(found, tuple) else (found, 1.0)
        return self._angles[positions], self._scale


class PagedContext:
    """One forward pass of a batch.

    Megatron-Core asks an inference context for its kind of batching (inference/contexts/base_context.py upstream, whose
    constructor differs between versions). Local attention asks for the rest.

    Args:
        multiple: the number of tokens is padded to a multiple of it, for sequence parallelism.
        rotary: the table of earlier passes.
    """

    def __init__(
        self, batch: Batch, cache: PagedKVCache, rotary: RotaryTable, device: torch.device, multiple: int
    ) -> None:
        self._cache, self._rotary, self._device = cache, rotary, device
        self._angles: tuple[Tensor, float] | None = None
        decoding = [entry for entry in batch.entries if entry.num_tokens == 1]
        self.entries = [*decoding, *(entry for entry in batch.entries if entry.num_tokens > 1)]
        self.num_decode = len(decoding)
        tokens = [token for entry in self.entries for token in entry.sequence.tokens[entry.start : entry.end]]
        positions = [position for entry in self.entries for position in range(entry.start, entry.end)]
        self.num_tokens = len(tokens)
        padding = [0] * (-self.num_tokens % multiple)
        self.tokens, self.positions = (self._whole_numbers(x + padding) for x in (tokens, positions))
        slots = [self._slots(entry) for entry in self.entries]
        self.slots = torch.cat([x[entry.start :] for x, entry in zip(slots, self.entries, strict=True)])
        self.decode_slots, self.decode_mask = self._decode(slots[: self.num_decode])
        self.prefills = []
        ends = list(accumulate(entry.num_tokens for entry in self.entries))
        for end, entry, own in list(zip(ends, self.entries, slots, strict=True))[self.num_decode :]:
            self.prefills.append(Prefill(slice(end - entry.num_tokens, end), own))
        self.sampled_rows = self._whole_numbers(
            [end - 1 for end, entry in zip(ends, self.entries, strict=True) if entry.samples]
        )
        """Rows of the last tokens of those entries whose next token is wanted, in the order of `entries`."""

    def is_static_batching(self) -> bool:
        """Sequences of any lengths are batched."""
        return False

    def is_dynamic_batching(self) -> bool:
        """Sequences of any lengths are batched."""
        return True

    def is_decode_only(self) -> bool:
        """Whether each sequence has one token."""
        return not self.prefills

    def layer(self, number: int) -> LayerCache:
        """The cache of one layer."""
        return self._cache.layer(number)

    def rotary_angles(self, rotary: Any) -> tuple[Tensor, float]:
        """Angles [t, 1, 1, d] of the tokens, and their factor. `rotary` has the same settings in all layers."""
        if self._angles is None:
            length = max(entry.end for entry in self.entries)
            self._angles = self._rotary.at(rotary, self.positions, length)
        return self._angles

    def _slots(self, entry: BatchEntry) -> Tensor:
        """Of all tokens of a sequence up to the last of this pass."""
        size = self._cache.block_size
        starts = self._whole_numbers([block * size for block in entry.blocks])
        return (starts.unsqueeze(1) + torch.arange(size, device=self._device)).flatten()[: entry.end]

    def _decode(self, slots: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Slots [n, k] of the tokens that each decoding sequence attends to, and what is added to their scores [n, k].

        Shorter sequences repeat their own last token, so that no other sequence can reach them.
        """
        longest = max((len(own) for own in slots), default=0)
        padded = [torch.cat([own, own[-1:].expand(longest - len(own))]) for own in slots]
        lengths = self._whole_numbers([len(own) for own in slots])
        beyond = torch.arange(longest, device=self._device) >= lengths.unsqueeze(1)
        mask = torch.zeros(beyond.shape, device=self._device).masked_fill_(beyond, -torch.inf)
        return torch.stack(padded) if padded else beyond.long(), mask

    def _whole_numbers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
