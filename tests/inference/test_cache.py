"""Tensors of the KV cache: their size, what rounding costs, and copies of blocks."""

from __future__ import annotations

import pytest
import torch

from moe_train.config.model import ModelConfig
from moe_train.inference.blocks import BlockCopy
from moe_train.inference.cache import PagedKVCache, PagedTensor
from parallel.architecture.kv_cache import CACHE_FORMATS, CachePart, bytes_per_token, cache_parts

CPU = torch.device("cpu")
MODELS = {
    "mla": ModelConfig(num_layers=2, kv_lora_rank=256, qk_rope_head_dim=16),
    "mla_narrow": ModelConfig(num_layers=2, kv_lora_rank=48, qk_rope_head_dim=6),
    "gqa": ModelConfig(attention="gqa", num_layers=2, num_attention_heads=4, num_query_groups=2, head_dim=24),
}
RELATIVE_ERROR = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4, "int8": 0.5 / 127, "int4": 0.5 / 7}
"""At most, of the largest number of a group: half the distance between two numbers of the format."""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_allocated_memory_is_the_formula(name: str, cache_format: str) -> None:
    model = MODELS[name]
    cache = PagedKVCache(cache_parts(model, cache_format), [1, 2], 3, 4, torch.float32, CPU)
    assert cache.num_bytes == 3 * 4 * bytes_per_token(model, cache_format)


@pytest.mark.parametrize("width", [256, 5])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_what_is_read_is_what_was_written_within_the_precision_of_the_format(cache_format: str, width: int) -> None:
    group = 128 if width == 256 else width
    part = CachePart("key", 2, width, CACHE_FORMATS[cache_format], group)
    tensor = PagedTensor(part, 6, torch.float32, CPU)
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([1e-1, 1.0, 50.0]).view(3, 1, 1)
    x[1, 0] = 0
    tensor.write(torch.tensor([4, 0, 5]), x)
    found = tensor.read(torch.tensor([[4, 0], [5, 5]]))
    assert torch.equal(found[1, 0], found[1, 1])
    found = found.flatten(0, 1)[:3]
    assert not found[1, 0].any()
    largest = x.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, group).flatten(-2)
    allowed = RELATIVE_ERROR[cache_format] * largest
    assert ((found - x).abs() <= allowed * (1 + 1e-5)).all()
    assert tensor.is_exact == (cache_format == "fp32")
    if cache_format != "fp32":
        assert (found - x).abs().max() > 0
    untouched = tensor.read(torch.tensor([1, 2, 3]))
    assert not untouched.any()


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_blocks_are_copied_one_after_the_other_in_all_layers(cache_format: str) -> None:
    cache = PagedKVCache(cache_parts(MODELS["mla"], cache_format), [3, 7], 3, 2, torch.bfloat16, CPU)
    x = torch.randn(2, 1, 256, dtype=torch.bfloat16)
    for layer in (3, 7):
        cache.layer(layer).write(torch.tensor([0, 1]), latent=x)
    cache.copy([BlockCopy(0, 1), BlockCopy(1, 2)])
    for layer in (3, 7):
        first, second, third = cache.layer(layer).read("latent", torch.arange(6)).split(2)
        assert first.any()
        assert torch.equal(first, second)
        assert torch.equal(first, third)
