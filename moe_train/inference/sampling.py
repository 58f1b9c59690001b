"""Choosing the next token from logits. What is chosen for a sequence depends on its own logits and seed alone.

A token is drawn with the Gumbel-max trick: it is the largest of (logit / temperature + noise). The noise is a hash of
seed, completion, position and token. So it does not depend on what else is in the batch, on the device, or on how many
tokens a forward pass computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from moe_train.inference.sampling_params import SamplingParams

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_INCREMENT, _FACTORS, _SHIFTS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (30, 27, 31)


@dataclass(frozen=True)
class TokenChoice:
    """What decides the next token of a sequence, apart from its logits.

    Args:
        completion: which one of its prompt, from 0.
        position: tokens that were generated before.
        prompt, generated: all tokens before, where the parameters penalise some.
    """

    params: SamplingParams
    completion: int
    position: int
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()

    @property
    def noise_seed(self) -> int:
        """64 bits, of this position of this completion."""
        text = f"{self.params.seed or 0}:{self.completion}:{self.position}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def choose(logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """A token for each row of `logits` [n, vocabulary], fp32 -> [n]."""
    penalised = [row for row, choice in enumerate(choices) if choice.params.penalises]
    if penalised:
        logits = logits.clone()
        for row in penalised:
            _penalise(logits[row], choices[row])
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, choice in enumerate(choices) if choice.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits[rows], [choices[row] for row in drawn])
    return chosen


def _penalise(logits: Tensor, choice: TokenChoice) -> None:
    """Change the logits [vocabulary] of one sequence in place."""
    params = choice.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*choice.prompt, *choice.generated}), device=logits.device)
        own = logits[seen]
        logits[seen] = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    if choice.generated:
        generated = torch.tensor(choice.generated, device=logits.device)
        counts = torch.bincount(generated, minlength=len(logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _draw(logits: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """[n, vocabulary] -> [n]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    params = [choice.params for choice in choices]
    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / column([p.temperature for p in params])
    if any(p.filters for p in params):
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        size = logits.size(1)
        rank = torch.arange(size, device=logits.device)
        scaled = scaled.masked_fill(rank >= column([p.top_k or size for p in params]), -torch.inf)
        probabilities = scaled.softmax(dim=-1)
        improbable = probabilities < probabilities[:, :1] * column([p.min_p for p in params])
        # The first token stays for any top_p.
        before = probabilities.cumsum(dim=-1) - probabilities
        improbable |= (before >= column([p.top_p for p in params])) & (rank > 0)
        scaled = torch.empty_like(scaled).scatter_(1, order, scaled.masked_fill(improbable, -torch.inf))
    return (scaled + gumbel_noise([choice.noise_seed for choice in choices], scaled)).argmax(dim=-1)


def gumbel_noise(seeds: Sequence[int], like: Tensor) -> Tensor:
    """Independent numbers of the Gumbel distribution, one for each row's seed and token: fp64, the shape of `like`."""
    rows = torch.tensor([_signed(seed) for seed in seeds], device=like.device).unsqueeze(1)
    mixed = rows + torch.arange(1, like.size(1) + 1, device=like.device) * _signed(_INCREMENT)
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        mixed = (mixed ^ _logical_shift(mixed, shift)) * _signed(factor)
    uniform = (_logical_shift(mixed, 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_().log_().neg_()


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the 64 bits of `value`, whose multiplication and addition wrap around."""
    return value - (1 << 64) if value >> 63 else value
