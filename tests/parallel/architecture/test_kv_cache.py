"""Bytes of the KV cache, against figures that are published or follow from a model's shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.model import ModelConfig
from parallel.architecture.attention import ATTENTIONS
from parallel.architecture.kv_cache import ATTENTION_CACHES, bytes_per_token, cache_parts


def test_deepseek_v3_keeps_latent_and_rotary_key() -> None:
    model = compose(["model=deepseek_v3", "runtime=simulated"]).model
    assert bytes_per_token(model) == 61 * (512 + 64) * 2 == 70_272
    assert bytes_per_token(model, tp=8) == 70_272  # every rank has all of it
    # FlashMLA: 512 numbers in fp8, 4 fp32 scales, 64 numbers in bf16
    assert sum(part.bytes_per_token for part in cache_parts(model, "fp8")) == 512 + 4 * 4 + 64 * 2 == 656
    assert bytes_per_token(model, "fp8") == 40_016
    assert bytes_per_token(model, "int4") == 61 * (256 + 16 + 128)
    assert bytes_per_token(model, "int8", "int8") == 61 * (512 + 16 + 64 + 4)


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_grouped_query_attention_keeps_the_heads_of_its_rank(tp: int, heads: int) -> None:
    model = ModelConfig(attention="gqa", num_attention_heads=16, num_query_groups=4, head_dim=64, num_layers=3)
    assert bytes_per_token(model, "bf16", tp=tp) == 3 * 2 * heads * 64 * 2
    assert bytes_per_token(model, "fp8", tp=tp) == 3 * 2 * heads * (64 + 4)


def test_every_kind_has_a_row_and_does_not_get_that_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ATTENTION_CACHES) == set(ATTENTIONS)
    monkeypatch.setitem(ATTENTIONS, "window", replace(ATTENTIONS["gqa"], name="window"))
    with pytest.raises(NotImplementedError, match=r"no row in ATTENTION_CACHES of parallel/architecture/kv_cache\.py"):
        bytes_per_token(ModelConfig(attention="window"))
