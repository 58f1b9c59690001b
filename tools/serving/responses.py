"""Objects of OpenAI's interface, made of what the engine reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_train.data.tokenizer import Tokenizer
from moe_train.inference.protocol import ScoredToken, Update, json_logprob

Json = dict[str, Any]


@dataclass
class GrowingText:
    """One continuation, as it grows."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, update: Update) -> None:
        """Append what a step has brought."""
        self.text += update.text
        self.tokens += update.tokens
        self.finish_reason = update.finish_reason or self.finish_reason


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """What a request has cost."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[tuple[int, float | None, dict[int, float]]], offset: int
) -> Json:
    """`logprobs` of a text completion.

    Args:
        tokens: token id, its log-probability, and the most probable tokens with theirs.
        offset: characters before the first token.
    """
    texts = [tokenizer.text_of(token) for token, _, _ in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [json_logprob(logprob) for _, logprob, _ in tokens],
        "top_logprobs": [_by_text(tokenizer, top) if logprob is not None else None for _, logprob, top in tokens],
        "text_offset": offsets,
    }


def _by_text(tokenizer: Tokenizer, top: dict[int, float]) -> dict[str, float | None]:
    """Where several tokens have the same text, the most probable one counts."""
    found: dict[str, float] = {}
    for token, logprob in top.items():
        text = tokenizer.text_of(token)
        found[text] = max(logprob, found.get(text, logprob))
    return {text: json_logprob(logprob) for text, logprob in found.items()}


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[ScoredToken]) -> Json:
    """`logprobs` of a chat completion."""

    def entry(token: int, logprob: float) -> Json:
        text = tokenizer.text_of(token)
        return {"token": text, "logprob": json_logprob(logprob), "bytes": list(text.encode())}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(t, p) for t, p in one.top.items()]} for one in tokens
    ]
    return {"content": content, "refusal": None}
