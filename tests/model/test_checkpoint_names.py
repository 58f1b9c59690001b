"""Names and shapes of a model's tensors in a checkpoint: those that Transformer Engine's modules would have.

Transformer Engine runs on GPUs only, so its names are written out here, from upstream's spec functions
(models/gpt/gpt_layer_specs.py, models/gpt/moe_module_specs.py, transformer/multi_token_prediction.py) and the names of
its parameters: `weight`, `bias`, and `layer_norm_weight` where a linear layer has the norm before it fused.
"""

from __future__ import annotations

import pytest

from tests.distributed.helper import run_distributed
from tests.model.tiny import build_tiny

Shapes = dict[str, tuple[int, ...]]

# model=tiny with 2 layers and a width of 64: 4 heads, 16 experts of 160, 1 shared, 512 words
H, F, E, I, V = 64, 768, 16, 160, 512  # noqa: E741
GQA = ("model.attention=gqa", "model.num_query_groups=2", "model.head_dim=32", "model.rope_type=rope")
DENSE = ("model.num_experts=0", "model.num_shared_experts=0", "model.router_bias=false", "model.balance_losses=[]",
         "model.balance_loss_coeffs=[]")  # fmt: skip

MLA_WITHOUT_Q: Shapes = {
    "input_layernorm.weight": (H,),
    "self_attention.linear_q_proj.weight": (4 * 48, H),
    "self_attention.linear_kv_down_proj.weight": (64 + 16, H),
    "self_attention.linear_kv_up_proj.layer_norm_weight": (64,),
    "self_attention.linear_kv_up_proj.weight": (4 * (32 + 32), 64),
    "self_attention.linear_proj.weight": (H, 4 * 32),
}
MLA: Shapes = {
    **{name: shape for name, shape in MLA_WITHOUT_Q.items() if "linear_q_proj" not in name},
    "self_attention.linear_q_down_proj.weight": (96, H),
    "self_attention.linear_q_up_proj.layer_norm_weight": (96,),
    "self_attention.linear_q_up_proj.weight": (4 * 48, 96),
}
QKV: Shapes = {
    "self_attention.linear_qkv.layer_norm_weight": (H,),
    "self_attention.linear_qkv.weight": ((4 + 2 * 2) * 32, H),
    "self_attention.linear_proj.weight": (H, 4 * 32),
}
HEAD_NORMS: Shapes = {"self_attention.q_layernorm.weight": (32,), "self_attention.k_layernorm.weight": (32,)}
ALL_HEADS_NORMS: Shapes = {
    "self_attention.q_layernorm.weight": (4 * 32,),
    "self_attention.k_layernorm.weight": (2 * 32,),
}
BIAS: Shapes = {"self_attention.linear_qkv.bias": ((4 + 2 * 2) * 32,)}
MLP: Shapes = {
    "mlp.linear_fc1.layer_norm_weight": (H,),
    "mlp.linear_fc1.weight": (2 * F, H),
    "mlp.linear_fc2.weight": (H, F),
}
EXPERTS: Shapes = {
    "pre_mlp_layernorm.weight": (H,),
    "mlp.router.weight": (E, H),
    "mlp.router.expert_bias": (E,),
    "mlp.experts.experts.linear_fc1.weight": (E, 2 * I, H),
    "mlp.experts.experts.linear_fc2.weight": (E, H, I),
    "mlp.shared_experts.linear_fc1.weight": (2 * I, H),
    "mlp.shared_experts.linear_fc2.weight": (H, I),
}
GATE: Shapes = {"mlp.shared_experts.gate_weight": (1, H)}
OUTSIDE: Shapes = {
    "embedding.word_embeddings.weight": (V, H),
    "decoder.final_layernorm.weight": (H,),
    "output_layer.weight": (V, H),
}
PREDICTION: Shapes = {
    "mtp.layers.0.enorm.weight": (H,),
    "mtp.layers.0.hnorm.weight": (H,),
    "mtp.layers.0.eh_proj.weight": (H, 2 * H),
    "mtp.layers.0.final_layernorm.weight": (H,),
}


def _prefixed(prefix: str, *parts: Shapes) -> Shapes:
    return {prefix + name: shape for part in parts for name, shape in part.items()}


def _numbered(attention: Shapes, *more: Shapes) -> Shapes:
    """A dense layer, an MoE layer, and a prediction depth."""
    return {
        **OUTSIDE,
        **PREDICTION,
        **_prefixed("decoder.layers.0.", attention, MLP),
        **_prefixed("decoder.layers.1.", attention, EXPERTS, *more),
        **_prefixed("mtp.layers.0.transformer_layer.", attention, EXPERTS, *more),
    }


def _stacked(layer: Shapes, count: int) -> Shapes:
    """Layers that are all alike have one name and a leading axis."""
    return {f"decoder.layers.{name}": (count, *shape) for name, shape in layer.items()}


EXPECTED: dict[tuple[str, ...], Shapes] = {
    (): _numbered(MLA),
    ("model.q_lora_rank=0",): _numbered(MLA_WITHOUT_Q),
    GQA: _numbered(QKV),
    (*GQA, "model.qk_norm=head"): _numbered({**QKV, **HEAD_NORMS}),
    (*GQA, "model.qk_norm=full"): _numbered({**QKV, **ALL_HEADS_NORMS}),
    (*GQA, "model.qkv_bias=true", "model.shared_expert_gate=true"): _numbered({**QKV, **BIAS}, GATE),
    (*GQA, *DENSE): {
        **OUTSIDE,
        **PREDICTION,
        **_stacked({**QKV, **MLP}, 2),
        **_prefixed("mtp.layers.0.transformer_layer.", QKV, MLP),
    },
    (*DENSE, "model.mtp_num_layers=0", "model.tie_embeddings=true"): {
        **{name: shape for name, shape in OUTSIDE.items() if "output" not in name},
        **_stacked({**MLA, **MLP}, 2),
    },
}  # fmt: skip


def names(*overrides: str) -> Shapes:
    """Global name -> global shape of every tensor of the model, as a checkpoint has it."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from parallel.runtime import cpu

    cpu.prepare()
    (chunk,) = build_tiny(*overrides)
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)})
    apply_factories(state)
    return {s.key: tuple(s.global_shape) for s in nested_values(state) if isinstance(s, ShardedTensor)}


@pytest.mark.parametrize("overrides", EXPECTED, ids=" ".join)
def test_tensors_have_the_names_that_transformer_engine_gives_them(overrides: tuple[str, ...]) -> None:
    (found,) = run_distributed(names, 1, *overrides)
    assert sorted(found.items()) == sorted(EXPECTED[overrides].items())
