"""Inference as moe-memory and moe-plan count its KV cache. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc
from parallel.architecture.kv_cache import CACHE_FORMATS


@dataclass
class KVCacheConfig:
    """What is generated at the same time, and the format of its KV cache."""

    context_length: int | None = doc(
        None, "Tokens of one sequence, prompt and continuation; null means train.seq_length.", minimum=1
    )
    cache_format: str | None = doc(
        None, "Format of the KV cache; null shows all of them.",
        choices=tuple(CACHE_FORMATS),
    )  # fmt: skip
    rotary_format: str | None = doc(
        None, "Format of the rotary key of multi-head latent attention; null means cache_format, or bf16 where that "
        "has scales.", choices=tuple(CACHE_FORMATS),
    )  # fmt: skip
    block_size: int = doc(16, "Tokens in one block of the KV cache.", minimum=1, maximum=1_000_000)
    max_batch_tokens: int = doc(
        2048, "Tokens of one forward pass, over all sequences.", minimum=1, maximum=1_000_000_000
    )
    max_sequences: int = doc(
        64, "Sequences whose next token one forward pass computes.", minimum=1, maximum=1_000_000_000
    )
