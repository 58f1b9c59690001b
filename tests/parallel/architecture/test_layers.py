"""The description of a layer: shapes, sharding and widths on a rank against values written by hand."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.model import ModelConfig
from parallel.architecture.attention import ATTENTIONS, modules_of_other_attentions
from parallel.architecture.layers import Layer, describe_layer, describe_mtp
from parallel.architecture.parts import Shard, Width

# Shape, and sharding, of each linear layer of the largest model with each kind of attention.
DEEPSEEK_V3 = {
    "self_attention.linear_q_down_proj.weight": (1536, 7168, Shard.LATENT),
    "self_attention.linear_q_up_proj.weight": (128 * 192, 1536, Shard.COLUMN),
    "self_attention.linear_kv_down_proj.weight": (576, 7168, Shard.LATENT),
    "self_attention.linear_kv_up_proj.weight": (128 * 256, 512, Shard.COLUMN),
    "self_attention.linear_proj.weight": (7168, 128 * 128, Shard.ROW),
    "mlp.router.weight": (256, 7168, Shard.REPLICATED),
    "mlp.experts.experts.linear_fc1.weight": (4096, 7168, Shard.COLUMN),
    "mlp.experts.experts.linear_fc2.weight": (7168, 2048, Shard.ROW),
    "mlp.shared_experts.linear_fc1.weight": (4096, 7168, Shard.COLUMN),
    "mlp.shared_experts.linear_fc2.weight": (7168, 2048, Shard.ROW),
}
QWEN3_235B = {
    "self_attention.linear_qkv.weight": ((64 + 2 * 4) * 128, 4096, Shard.COLUMN),
    "self_attention.linear_proj.weight": (4096, 64 * 128, Shard.ROW),
    "mlp.router.weight": (128, 4096, Shard.REPLICATED),
    "mlp.experts.experts.linear_fc1.weight": (3072, 4096, Shard.COLUMN),
    "mlp.experts.experts.linear_fc2.weight": (4096, 1536, Shard.ROW),
}


def described(name: str, moe: bool = True, *changes: str) -> Layer:
    return describe_layer(compose([f"model={name}", *changes]).model, moe)


@pytest.mark.parametrize(("name", "expected"), [("deepseek_v3", DEEPSEEK_V3), ("qwen3_235b_a22b", QWEN3_235B)])
def test_linear_layers_have_the_published_shapes(name: str, expected: dict[str, tuple[int, int, Shard]]) -> None:
    linears = described(name).linears
    assert {one.name: (one.outputs.size, one.inputs.size, one.shard) for one in linears} == expected


def test_only_router_and_gate_stay_out_of_fp8() -> None:
    linears = described("qwen2_moe_57b_a14b").linears
    high_precision = {one.name for one in linears if not one.quantised}
    assert high_precision == {"mlp.router.weight", "mlp.shared_experts.gate_weight"}
    assert describe_mtp(compose(["model=deepseek_v3"]).model)[0].quantised


def test_widths_on_a_rank() -> None:
    """Key/value heads are on several ranks where there are fewer heads than ranks."""
    qkv = Width("head_dim", (128,), heads=64, kv_heads=4)
    assert [qkv.on_rank(ranks) for ranks in (1, 4, 8)] == [72 * 128, 18 * 128, 10 * 128]
    assert qkv.arithmetic(8) == "(8 + 2 x 1) x 128"
    gate_and_up = Width("ffn_hidden_size", (100,), copies=2)
    assert (gate_and_up.size, gate_and_up.on_rank(4), gate_and_up.arithmetic(4)) == (200, 50, "100 / 4")
    assert Width("qk_nope_head_dim", (32, 16), heads=4).arithmetic(2) == "2 x (32 + 16)"


def test_experts_are_sharded_by_their_own_degree() -> None:
    degrees = {one.name: one.degree for one in described("deepseek_v3").linears}
    assert {name for name, degree in degrees.items() if degree == "etp"} == {
        "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_kind_of_attention_names_fields_of_the_model_and_its_own_recomputation(name: str) -> None:
    kind = ATTENTIONS[name]
    assert set(kind.fields) <= {field.name for field in dataclasses.fields(ModelConfig)}
    model = compose(["model=tiny", f"model.attention={name}"]).model
    assert not modules_of_other_attentions(model) & set(kind.recompute_modules)
    recomputed = {module for linear in kind.describe(model).linears for module in linear.recomputed_by}
    assert recomputed <= set(kind.recompute_modules)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_each_tensor_has_one_name(name: str) -> None:
    for moe in (False, True):
        names = [tensor.name for tensor in described("tiny", moe, f"model.attention={name}").tensors]
        assert len(names) == len(set(names))
