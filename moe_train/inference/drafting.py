"""Drafts by multi-token prediction (arXiv 2412.19437, section 2.2): guesses of the tokens behind the newest one.

The layers of multi-token prediction run over the positions of a pass, and so fill their part of the cache. At position
i the layer of depth d, from 1, reads the token at i + d. Behind the newest token that is the draft of the depth before.
Drafts are verified by the next pass, so that a wrong one costs time alone: blocks that sequences share, for example,
have the numbers of these layers for the tokens that followed in the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_train.inference.cache import PagedKVCache
from moe_train.inference.context import PagedContext, RotaryTable
from moe_train.inference.forward import CachedModel
from moe_train.inference.scheduler import Batch, BatchEntry

NewTokens = Mapping[BatchEntry, Sequence[int]]
"""What the entries of a pass have got, those that are sampled."""


def new_tokens(batches: Sequence[Batch], chosen: Sequence[int]) -> dict[BatchEntry, list[int]]:
    """The tokens that the entries of a pass have got: up to the first that is not the draft.

    Args:
        chosen: the token of each row of all batches.
    """
    rows = iter(chosen)
    new: dict[BatchEntry, list[int]] = {}
    for entry in (entry for batch in batches for entry in batch.entries):
        for _ in entry.scored_positions:
            next(rows)
        tokens = [next(rows) for _ in entry.sampled_positions]
        if tokens:
            new[entry] = tokens[: entry.num_right(tokens) + 1]
    return new


def num_positions(entry: BatchEntry, new: NewTokens) -> int:
    """Positions of an entry whose next token is known after the pass."""
    if not entry.samples:
        return entry.num_tokens
    return entry.known - entry.start + len(new[entry]) - 1


class Drafter:
    """Makes drafts on the ranks of the last pipeline stage.

    Args:
        depths: layers of multi-token prediction.
    """

    def __init__(
        self, model: CachedModel, cache: PagedKVCache, rotary: RotaryTable, depths: int, device: torch.device
    ) -> None:
        self._model, self._cache, self._rotary = model, cache, rotary
        self._depths, self._device = depths, device

    def drafts(self, batch: Batch, hidden: Tensor | None, new: NewTokens, padded_tokens: int) -> Tensor:
        """The drafts of the entries of a batch that are sampled, in their order: [n, depths].

        All positions of the pass are computed, also those of wrong drafts, whose results nothing reads: oneDNN compiles
        a kernel for each number of tokens that it meets.

        Args:
            hidden: of the decoder after the pass, [t, h]; None where the batch is empty.
            padded_tokens: positions of the batch, with those that only pad it.
        """
        states = hidden[: batch.num_tokens] if hidden is not None and batch.entries else self._no_states()
        texts = {e: [*e.sequence.tokens[e.start : e.known], *new.get(e, ())] for e in batch.entries}
        sampled = [e for e in batch.entries if e.samples]
        guesses: list[Tensor] = []
        for depth in range(self._depths):
            following = tuple(_following(e, texts[e][depth + 1 :], num_positions(e, new)) for e in batch.entries)
            followed = Batch(following, ())
            context = PagedContext(followed, self._cache, self._rotary, self._device, padded_tokens, first_samples=True)
            output = self._model.predict(depth, states, context)
            assert output.hidden is not None
            states = output.hidden[: len(states)]
            if output.logits is not None:
                guesses.append(output.logits.argmax(dim=-1))
                for entry, token in zip(sampled, guesses[-1].tolist(), strict=True):
                    texts[entry].append(token)
        if not sampled:
            return torch.zeros(0, self._depths, dtype=torch.long, device=self._device)
        return torch.stack(guesses, dim=1)

    def _no_states(self) -> Tensor:
        return torch.zeros(0, self._model.hidden_size, dtype=self._model.dtype, device=self._device)


def _following(entry: BatchEntry, tokens: list[int], count: int) -> BatchEntry:
    """The positions of an entry with the tokens that the layer reads there, of which the first `count` are wanted.

    Deeper layers would read tokens behind a chunk of a prompt, and all layers those behind the first wrong draft: they
    read the last that there is.
    """
    read = (*tokens[:count], *tokens[-1:] * (entry.num_tokens - min(count, len(tokens))))
    return replace(entry, known=entry.start + count if entry.samples else entry.known, tokens=read, scored=False)
