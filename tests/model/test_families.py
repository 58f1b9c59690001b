"""What single options of the architecture do to the model that Megatron-Core builds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moe_train.config.model import ModelConfig
from moe_train.config.resolve import resolve
from moe_train.model.local.router import scores_groups_by_best
from tests.distributed.helper import run_distributed
from tests.model.tiny import build_tiny

GQA = ("model.attention=gqa", "model.head_dim=16", "model.rope_type=rope")
BEST = ("model.router_score=softmax", "model.router_bias=false", "model.router_pre_softmax=true",
        "model.router_scaling_factor=1.0", "model.router_group_score=max")  # fmt: skip


def _modules(names: tuple[str, ...], *overrides: str) -> list[Any]:
    from parallel.runtime import cpu

    cpu.prepare()
    (chunk,) = build_tiny(*overrides)
    return [module for module in chunk.modules() if type(module).__name__ in names]


# Scores of four groups: by the best expert the first two win, by the sum of the best two the last two.
SCORES = [1.0, -2.0, -3.0, -4.0, 0.9, -2.5, -3.0, -4.0, 0.8, 0.8, -3.0, -4.0, 0.7, 0.7, -3.0, -4.0]


def choices(*overrides: str) -> list[dict[int, float]]:
    """Expert -> weight of a token with these scores, of the router of each layer."""
    found = []
    for router in _modules(("Router", "BestExpertOfGroupRouter"), *overrides):
        weights, chosen = router.routing(torch.tensor(SCORES).view(1, 1, 16))
        found.append({int(expert): float(weights[0, expert]) for expert in chosen[0].nonzero()})
    return found


def test_groups_of_experts_are_ranked_by_their_best() -> None:
    """Two of four groups, top 4, in the decoder's and in the predicting layer; weights are softmax over all."""
    (best,), (summed,) = (run_distributed(choices, 1, *overrides) for overrides in (BEST, BEST[:-1]))
    total = sum(map(math.exp, SCORES))
    assert best == [{i: pytest.approx(math.exp(SCORES[i]) / total) for i in (0, 1, 4, 5)}] * 2
    assert summed == [{i: pytest.approx(math.exp(SCORES[i]) / total) for i in (8, 9, 12, 13)}] * 2


def upstream_is_left_as_it_was(*overrides: str) -> bool:
    """Whether Megatron-Core ranks groups as before, after a router that does not has failed."""
    from megatron.core.transformer.moe import moe_utils

    before = moe_utils.group_limited_topk
    (router, *_) = _modules(("BestExpertOfGroupRouter",), *overrides)
    with pytest.raises(RuntimeError):
        router.routing(torch.zeros(1, 1, 15))
    return moe_utils.group_limited_topk is before


def test_other_models_are_ranked_as_upstream_does() -> None:
    assert run_distributed(upstream_is_left_as_it_was, 1, *BEST) == [True]
    assert not scores_groups_by_best(ModelConfig(num_experts=8, router_group_score="max"))


def epsilons(*overrides: str) -> list[tuple[str, float]]:
    """(name, epsilon) of every norm of the first chunk."""
    from parallel.runtime import cpu

    cpu.prepare()
    (chunk,) = build_tiny(*overrides)
    return [(name, module.eps) for name, module in chunk.named_modules() if hasattr(module, "eps")]


@pytest.mark.parametrize(("rank", "latents"), [(96, 6), (0, 3)])
def test_latent_norms_have_their_own_epsilon(rank: int, latents: int) -> None:
    """And no other norm has it: two decoder layers and the predicting one."""
    overrides = (f"model.q_lora_rank={rank}", "model.norm_epsilon=1e-5", "model.latent_norm_epsilon=1e-6")
    (found,) = run_distributed(epsilons, 1, *overrides)
    inside = [eps for name, eps in found if name.endswith(("q_layernorm", "kv_layernorm"))]
    assert inside == [1e-6] * latents
    assert {eps for name, eps in found if not name.endswith(("q_layernorm", "kv_layernorm"))} == {1e-5}
    (found,) = run_distributed(epsilons, 1, *overrides[:2])
    assert {eps for _, eps in found} == {1e-5}


def fused_epsilons() -> list[Any]:
    """Epsilons that stand-ins for Transformer Engine's fused layers get, and the error for one that has none."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from moe_train.model.surgery import set_latent_norm_epsilon

    class Fused(torch.nn.Module):
        eps = 1e-5

    attention = MLASelfAttention.__new__(MLASelfAttention)
    torch.nn.Module.__init__(attention)
    attention.linear_q_up_proj, attention.linear_kv_up_proj = Fused(), Fused()
    attention.q_layernorm = attention.kv_layernorm = torch.nn.Identity()
    chunk: Any = torch.nn.Sequential(attention)
    set_latent_norm_epsilon(chunk, ModelConfig(q_lora_rank=8, latent_norm_epsilon=1e-6))
    found: list[Any] = [attention.linear_q_up_proj.eps, attention.linear_kv_up_proj.eps]
    attention.linear_kv_up_proj = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="1 latent norms"):
        set_latent_norm_epsilon(chunk, ModelConfig(q_lora_rank=8, latent_norm_epsilon=1e-6))
    return found


def test_fused_latent_norms_have_it_too() -> None:
    """Transformer Engine holds the norm inside the projection behind it; a module that changed its ways is noticed."""
    assert run_distributed(fused_epsilons, 1) == [[1e-6, 1e-6]]


def frequencies(*overrides: str) -> list[float]:
    """Rotary frequencies, radians a token."""
    (rotary,) = _modules(("RotaryEmbedding",), *GQA, *overrides)
    values: list[float] = rotary.inv_freq.tolist()
    return values


def test_rotary_frequencies_of_half_a_head_and_of_llama_3_1() -> None:
    """By the definitions: transformers `_compute_default_rope_parameters` and `_compute_llama3_parameters`."""
    plain = [1e6 ** (-2 * i / 16) for i in range(8)]
    (half,) = run_distributed(frequencies, 1, "model.rope_base=1e6", "model.rotary_percent=0.5")
    assert half == pytest.approx([1e6 ** (-2 * i / 8) for i in range(4)])
    (found,) = run_distributed(
        frequencies, 1, "model.rope_base=1e6", "model.rope_type=llama3", "model.llama3_factor=16"
    )
    expected = []
    for frequency in plain:
        length = 2 * math.pi / frequency
        smooth = min(1.0, max(0.0, (8192 / length - 1) / (4 - 1)))
        expected.append((1 - smooth) * frequency / 16 + smooth * frequency)
    assert found == pytest.approx(expected)
    assert 0 < sum(a == pytest.approx(b) for a, b in zip(found, plain, strict=True)) < 8


GATED = ("model.shared_expert_gate=true", "model.shared_expert_ffn_hidden_size=48")


def gated_output(*overrides: str) -> tuple[list[int], bool]:
    """Width of the first shared expert, and whether its output is scaled by the sigmoid of the gate's score."""
    (shared, *_) = _modules(("SharedExpertMLP",), *overrides)
    tokens = torch.randn(5, 1, 64)
    torch.nn.init.normal_(shared.gate_weight)
    score = torch.sigmoid(tokens @ shared.gate_weight.T)
    whole = shared(tokens)
    shared.use_shared_expert_gate = False
    return list(shared.linear_fc2.weight.shape), torch.allclose(whole, shared(tokens) * score)


def test_shared_experts_are_gated_and_of_their_own_width() -> None:
    assert run_distributed(gated_output, 1, *GATED) == [([64, 48], True)]


def gates_elsewhere() -> list[tuple[str, bool]]:
    """Device and mark of every shared expert's gate on a rank without memory for its tensors."""
    from moe_train.config.composition.validate import validate
    from moe_train.model.build import build, transformer_config
    from parallel import groups
    from parallel.runtime import simulated
    from tests.model.tiny import tiny_config

    torch.distributed.destroy_process_group()
    simulated.start(0, 2)
    cfg = tiny_config(*GATED, "runtime=simulated", "parallel.tp=2")
    layout = validate(cfg)
    groups.create(layout, cfg.seed)
    (chunk,) = build(cfg, transformer_config(resolve(cfg, layout, runtime="simulated")), "local", 1, weights=False)
    gates: list[Any] = [p for name, p in chunk.named_parameters() if name.endswith("gate_weight")]
    return [(gate.device.type, gate.sequence_parallel) for gate in gates]


def test_gates_are_on_the_device_of_the_rank_and_their_gradients_summed() -> None:
    """Upstream makes them on the CPU, where an optimizer on GPUs could not use them."""
    assert run_distributed(gates_elsewhere, 1) == [[("meta", True)] * 2]
