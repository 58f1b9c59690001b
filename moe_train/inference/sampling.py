"""Choosing the next token from logits. What is chosen for a sequence depends on its own logits and seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from parallel.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How the continuation of a prompt is chosen.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 takes the most probable token, else logits are divided by it.
        top_k: only the `top_k` most probable tokens are drawn; 0 means all.
        top_p: only the most probable tokens whose probabilities add up to `top_p` are drawn (nucleus sampling).
        min_p: only tokens are drawn that have at least `min_p` times the probability of the most probable one.
        seed: of the draws. Each completion of a prompt has its own random stream.
        n: completions of the prompt.
        stop_token_ids: a continuation ends with the first of them.
        top_logprobs: log-probabilities of so many of the most probable tokens are returned for each position.

    Raises:
        ConfigError: a value is outside its range.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    n: int = 1
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "n": (self.n >= 1, "at least 1"),
            "top_logprobs": (self.top_logprobs >= 0, "0 or more"),
        }
        for name, (fits, values) in allowed.items():
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)} is outside its range", f"set {name} to {values}")


@dataclass
class Sampler:
    """The random stream of one sequence."""

    params: SamplingParams
    generator: torch.Generator

    @classmethod
    def of(cls, params: SamplingParams, completion: int) -> Sampler:
        """That of the `completion`-th completion of a prompt, from 0."""
        digest = blake2b(f"{params.seed}:{completion}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1
        return cls(params, torch.Generator().manual_seed(seed))

    def uniform(self) -> float:
        """The next number of the stream, in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """A token for each row of `logits` [n, vocabulary], fp32 -> [n].

    Each row takes one number of its random stream, unless it is greedy.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(logits[rows], [samplers[row] for row in drawn])
    return chosen


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Inverse of the cumulative distribution over the tokens by decreasing probability, at one uniform number each."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    params = [sampler.params for sampler in samplers]
    size = logits.size(1)
    scaled = logits.double() / column([p.temperature for p in params])
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(size, device=logits.device)
    scaled = scaled.masked_fill(rank >= column([p.top_k or size for p in params]), -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    improbable = probabilities < probabilities[:, :1] * column([p.min_p for p in params])
    # The first token stays for any top_p.
    improbable |= (before >= column([p.top_p for p in params])) & (rank > 0)
    probabilities = probabilities.masked_fill(improbable, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    target = column([sampler.uniform() for sampler in samplers]) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding can put the target behind the last token
    return order.gather(1, torch.minimum(index, last)).squeeze(1)
