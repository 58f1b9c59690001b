"""The feed-forward of cached layers computes what the module of training does, in each of its ways."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import unwrap_model

from moe_train.model.local import cached_layers
from moe_train.model.local.cached_parts import through_module
from tests.distributed.helper import run_distributed
from tests.inference.test_engine import SHAPES, built


def differences(counts: list[int]) -> list[float]:
    """Largest difference for so many tokens: with all experts at once, and with a GEMM for each chosen expert."""
    _, chunks = built({}, SHAPES["mla"])
    (model,) = unwrap_model(list(chunks))
    moe = next(layer.mlp for layer in model.decoder.layers if isinstance(layer.mlp, MoELayer)).eval()
    experts = cached_layers._Experts(moe)
    generator = torch.Generator().manual_seed(1)
    found = []
    for count in counts:
        x = torch.randn(count, moe.config.hidden_size, generator=generator)
        for most, all_at_once in ((1 << 40, True), (0, False)):
            cached_layers.MOST_MULTIPLICATIONS[torch.float32] = most
            assert experts._computes_all(count, moe.config.moe_router_topk) == all_at_once
            with torch.inference_mode():
                found.append((experts(x) - through_module(moe, x)).abs().max().item())
    return found


def test_experts_are_those_of_training() -> None:
    (found,) = run_distributed(differences, 1, [1, 2, 5, 40])
    assert len(found) == 8
    assert max(found) < 1e-5
