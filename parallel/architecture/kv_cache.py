"""What the KV cache keeps of a token, and in how many bytes. No torch import.

Multi-head latent attention keeps the latent and the rotary key that all heads share (arXiv 2405.04434, section 2.1.2).
Grouped-query attention keeps keys and values of each head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parallel.architecture.attention import attention_kind, row_of
from parallel.architecture.parts import Model

SCALE_BYTES = 4
LATENT_GROUP = 128
"""Numbers of a latent that share a scale, as in FlashMLA's layout."""


@dataclass(frozen=True)
class CacheFormat:
    """How a number is stored.

    Args:
        scaled: whether groups of numbers share an fp32 scale.
    """

    name: str
    bits: int
    scaled: bool


_ROWS = (
    CacheFormat("fp32", 32, scaled=False),
    CacheFormat("bf16", 16, scaled=False),
    CacheFormat("fp16", 16, scaled=False),
    CacheFormat("fp8", 8, scaled=True),  # e4m3
    CacheFormat("int8", 8, scaled=True),
    CacheFormat("int4", 4, scaled=True),
)
CACHE_FORMATS = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class CachePart:
    """One tensor of a layer's cache: [token, heads, width] on one rank.

    Args:
        group: numbers of one head that share a scale.
    """

    name: str
    heads: int
    width: int
    format: CacheFormat
    group: int

    @property
    def data_bytes(self) -> int:
        """Of one head of a token, without scales."""
        return -(-self.width * self.format.bits // 8)

    @property
    def num_scales(self) -> int:
        """Of one head of a token."""
        return -(-self.width // self.group) if self.format.scaled else 0

    @property
    def bytes_per_token(self) -> int:
        """Of one layer."""
        return self.heads * (self.data_bytes + self.num_scales * SCALE_BYTES)


def cache_parts(
    model: Model, cache_format: str = "bf16", rotary_format: str | None = None, tp: int = 1
) -> list[CachePart]:
    """The tensors that one of `tp` tensor-parallel ranks keeps of each layer.

    Args:
        cache_format, rotary_format: names in `CACHE_FORMATS`. The rotary key of latent attention has a format of its
            own: None takes `cache_format` where that has no scales, else bf16. With fp8 that is FlashMLA's layout.

    Raises:
        NotImplementedError: the model's kind of attention has no row in `ATTENTION_CACHES`.
    """
    form = CACHE_FORMATS[cache_format]
    rotary = CACHE_FORMATS[rotary_format or ("bf16" if form.scaled else cache_format)]
    row = row_of(attention_kind(model), ATTENTION_CACHES, "ATTENTION_CACHES of parallel/architecture/kv_cache.py")
    return row(model, form, rotary, tp)


def _latent_parts(model: Model, form: CacheFormat, rotary: CacheFormat, tp: int) -> list[CachePart]:
    """Every rank has all of both."""
    latent, rope = model.kv_lora_rank, model.qk_rope_head_dim
    return [
        CachePart("latent", 1, latent, form, LATENT_GROUP if latent % LATENT_GROUP == 0 else latent),
        CachePart("rotary_key", 1, rope, rotary, rope),
    ]


def _grouped_parts(model: Model, form: CacheFormat, rotary: CacheFormat, tp: int) -> list[CachePart]:
    """A rank has its heads. The numbers of a key or value head share a scale."""
    core = attention_kind(model).describe(model).core
    heads = int(core.kv_heads_on_rank(tp))
    return [CachePart(name, heads, width, form, width) for name, width in (("key", core.key), ("value", core.value))]


ATTENTION_CACHES: dict[str, Callable[[Model, CacheFormat, CacheFormat, int], list[CachePart]]] = {
    "mla": _latent_parts, "gqa": _grouped_parts,
}  # fmt: skip
"""By kind of attention: what `cache_parts` returns for a model, formats of the cache and the rotary key, and tp."""


def bytes_per_token(model: Model, cache_format: str = "bf16", rotary_format: str | None = None, tp: int = 1) -> int:
    """Bytes that one of `tp` tensor-parallel ranks keeps of a token, over all layers."""
    parts = cache_parts(model, cache_format, rotary_format, tp)
    return len(model.moe_layer_pattern) * sum(part.bytes_per_token for part in parts)
