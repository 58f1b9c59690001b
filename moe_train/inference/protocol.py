"""What a command and the ranks that generate for it tell each other. No torch import.

The command (a terminal, a server) runs in the process that starts the ranks. It is connected to rank 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Submit:
    """A request.

    Args:
        number: under which its updates come.
        prompt: token ids.
        params: values of `SamplingParams`, by name.
        stop: strings that end a continuation.
    """

    number: int
    prompt: list[int]
    params: dict[str, Any]
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Forget a request. No update of it follows once this was read."""

    number: int


@dataclass(frozen=True)
class Finish:
    """End the ranks."""


Command = Submit | Cancel | Finish


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log-probability, and the most probable tokens at its position with theirs."""

    token: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


def json_logprob(logprob: float | None) -> float | None:
    """A log-probability as JSON can have it: null for NaN, and -9999 for minus infinity, as in OpenAI's interface."""
    if logprob is None or math.isnan(logprob):
        return None
    return logprob if math.isfinite(logprob) else math.copysign(9999.0, logprob)


@dataclass
class Update:
    """What a step has brought one continuation.

    Args:
        completion: which one of the request, from 0.
        text: that follows the text of earlier updates.
        finish_reason: "stop" or "length" in the last update, else None.
    """

    number: int
    completion: int
    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Finished:
    """All continuations of a request have ended; its last update.

    Args:
        prompt: log-probabilities of the prompt's tokens but the first, where they were asked for.
    """

    number: int
    prompt: list[ScoredToken] | None = None


@dataclass(frozen=True)
class Rejected:
    """A request that cannot be: it is too long, or a parameter is outside of its range."""

    number: int
    cause: str
    remedy: str


@dataclass(frozen=True)
class Load:
    """The state of the engine after a step.

    Args:
        used_blocks: blocks of the KV cache that running sequences use.
        running, waiting: sequences.
    """

    used_blocks: int = 0
    running: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class StepReport:
    """Everything that one step has brought."""

    events: list[Update | Finished | Rejected]
    load: Load


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Args:
        num_blocks, block_size: of the KV cache, over all data-parallel replicas.
        cache_bytes: of the KV cache on one rank.
        max_sequence_length: tokens of a prompt with its continuation, at most.
        layout: of the ranks, as text.
    """

    num_blocks: int
    block_size: int
    cache_bytes: int
    max_sequence_length: int
    layout: str


Report = StepReport | Ready
