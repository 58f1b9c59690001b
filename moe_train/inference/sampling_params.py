"""How the continuation of a prompt is chosen. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import ConfigError

_MOST_COMPLETIONS = 1024
_INT32 = 2**31
_INT64 = 2**63
_LARGEST, _SMALLEST = 1e6, 1e-6
"""Of temperatures and penalties. Logits remain finite in fp32 after them."""


@dataclass(frozen=True)
class SamplingParams:
    """How the continuation of a prompt is chosen.

    Penalties are applied first, then the temperature, then top_k, top_p and min_p.

    Args:
        max_new_tokens: at most so many. 0 only scores the prompt.
        temperature: 0 takes the most probable token, else logits are divided by it.
        top_k: only the `top_k` most probable tokens are drawn; 0 means all.
        top_p: only the most probable tokens whose probabilities add up to `top_p` are drawn (nucleus sampling).
        min_p: only tokens are drawn that have at least `min_p` times the probability of the most probable one.
        repetition_penalty: logits of tokens in the prompt or the continuation are divided by it where they are
            positive, and multiplied by it where they are negative (CTRL, arXiv 1909.05858).
        presence_penalty: is subtracted from the logits of tokens in the continuation.
        frequency_penalty: is subtracted for each time that a token is in the continuation.
        seed: of the draws. Each completion of a prompt, and each position, has random numbers of its own. None asks for
            no particular one: commands then take `BaseEngine.any_seed`.
        n: completions of the prompt.
        stop_token_ids: a continuation ends with the first of them.
        top_logprobs: log-probabilities of so many of the most probable tokens are returned for each position.
        prompt_logprobs: not None also returns the log-probabilities of the prompt's tokens, and of so many of the most
            probable tokens at their positions.

    Raises:
        ConfigError: a value is outside its range.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = 0
    n: int = 1
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        most = _MOST_COMPLETIONS if self.max_new_tokens else 1
        count, penalty = f"from 0 to {_INT32 - 1}", f"from {-_LARGEST:g} to {_LARGEST:g}; 0 means none"
        allowed = {
            "max_new_tokens": (0 <= self.max_new_tokens < _INT32, count),
            "temperature": (
                self.temperature == 0 or _SMALLEST <= self.temperature <= _LARGEST,
                f"0, or from {_SMALLEST:g} to {_LARGEST:g}",
            ),
            "top_k": (0 <= self.top_k < _INT32, count),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                _SMALLEST <= self.repetition_penalty <= _LARGEST, f"from {_SMALLEST:g} to {_LARGEST:g}; 1 means none",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= _LARGEST, penalty),
            "frequency_penalty": (abs(self.frequency_penalty) <= _LARGEST, penalty),
            "seed": (self.seed is None or -_INT64 <= self.seed < _INT64, "null, or a whole number of 64 bits"),
            "n": (1 <= self.n <= most, f"from 1 to {_MOST_COMPLETIONS}, and 1 where max_new_tokens=0"),
            "top_logprobs": (0 <= self.top_logprobs < _INT32, count),
            "prompt_logprobs": (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs < _INT32, f"null, or {count}",
            ),
        }  # fmt: skip
        for name, (fits, values) in allowed.items():
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)!r:.50} is outside its range", f"set {name} to {values}")

    @property
    def penalises(self) -> bool:
        """Whether the logits depend on the tokens so far by more than the model."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0
