"""Options of the commands that run a trained model. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc
from parallel.architecture.kv_cache import CACHE_FORMATS


@dataclass
class EngineConfig:
    """The KV cache and the batches of generation."""

    cache_format: str | None = doc(
        None, "Format of the KV cache; null means the precision of the model.", choices=tuple(CACHE_FORMATS)
    )
    rotary_format: str | None = doc(
        None, "Format of the rotary key of latent attention; null means cache_format, or bf16 where that is scaled.",
        choices=tuple(CACHE_FORMATS),
    )  # fmt: skip
    block_size: int = doc(16, "Tokens in one block of the KV cache.", minimum=1, maximum=1_000_000)
    num_blocks: int | None = doc(
        None, "Blocks of the KV cache; null follows from memory_gib.", minimum=1, maximum=1_000_000_000
    )
    memory_gib: float | None = doc(
        None, "Memory of the KV cache on one rank, GiB; null means what max_sequences sequences can use, but at most a "
        "quarter of the memory that is free.", minimum=1e-6,
    )  # fmt: skip
    max_batch_tokens: int = doc(
        2048, "Tokens in one forward pass, over all sequences.", minimum=1, maximum=1_000_000_000
    )
    max_sequences: int = doc(64, "Sequences that run at the same time.", minimum=1, maximum=1_000_000)
