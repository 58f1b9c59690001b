"""Names, shapes and settings of the published models: no weights are needed for those."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_train.config.composition.compose import compose
from moe_train.config.walk import all_fields
from moe_train.conversion import hf_config as config
from moe_train.conversion.families import FAMILIES
from moe_train.conversion.hf_source import names_of
from moe_train.conversion.mapping import pieces
from moe_train.model.arithmetic import count_parameters
from parallel.architecture.layers import EMBEDDING, HEAD
from parallel.errors import CheckpointError, ConfigError

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_published_model_has_one_place(name: str) -> None:
    """All keys of deepseek_v3's 61 + 1 layers among them, in well under a minute."""
    model = compose([f"model={name}"]).model
    began = time.process_time()
    seen: set[tuple[str, int | None]] = set()
    total = 0
    for piece in pieces(model):
        assert (piece.key, piece.index) not in seen
        seen.add((piece.key, piece.index))
        blocks = sorted(block for part in piece.parts for block in part.blocks)
        rows = piece.rows if piece.key not in (EMBEDDING, HEAD) else model.vocab_size
        assert blocks[0][0] == 0
        assert blocks[-1][1] == rows
        assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks)), piece.key
        total += torch.Size(piece.shape).numel()
    count = count_parameters(model)
    assert total == count.total_with_mtp + count.expert_bias + count.mtp_expert_bias
    assert time.process_time() - began < 60


@pytest.mark.parametrize("name", [n for n in NAMES if n != "deepseek_moe_16b"])
def test_names_and_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """transformers builds the model of the config.json that is written here, without memory, and holds one tensor of
    all experts where a checkpoint has one for each."""
    model = compose([f"model={name}"]).model
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf(model, "bfloat16")))
    described = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = dict(AutoModelForCausalLM.from_config(described).state_dict().items())
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    if model.tie_embeddings:
        shapes.pop("lm_head.weight")
    ours = names_of(pieces(model))
    ours = {key: shape for key, shape in ours.items() if not _predicts(key, model.num_layers)}
    if name in ("mixtral_8x7b", "mixtral_8x22b", "minimax_m2"):
        ours = {key.replace("block_sparse_moe", "mlp"): shape for key, shape in ours.items()}
    routed = {key: shape for key, shape in ours.items() if ".mlp.experts." in key}
    fused = {key: shape for key, shape in shapes.items() if ".mlp.experts." in key}
    assert {k: v for k, v in ours.items() if k not in routed} == {k: v for k, v in shapes.items() if k not in fused}
    assert sum(torch.Size(s).numel() for s in routed.values()) == sum(torch.Size(s).numel() for s in fused.values())


def _predicts(key: str, layers: int) -> bool:
    words = key.split(".")
    return words[:2] == ["model", "layers"] and int(words[2]) >= layers


def test_prediction_layers_have_the_names_of_the_release() -> None:
    """model.layers.61 of deepseek-ai/DeepSeek-V3, its index file says."""
    model = compose(["model=deepseek_v3"]).model
    ours = names_of(pieces(model))
    of_layer = {key.removeprefix("model.layers.61."): shape for key, shape in ours.items() if ".61." in key}
    of_layer = {key: shape for key, shape in of_layer.items() if ".experts." not in key or ".experts.255." in key}
    hidden, heads = 7168, 128
    assert of_layer == {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "embed_tokens.weight": (129280, hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (129280, hidden),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_a_proj.weight": (1536, hidden),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (heads * 192, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (heads * 256, 512),
        "self_attn.o_proj.weight": (hidden, heads * 128),
        "mlp.gate.weight": (256, hidden),
        "mlp.gate.e_score_correction_bias": (256,),
        "mlp.experts.255.gate_proj.weight": (2048, hidden),
        "mlp.experts.255.up_proj.weight": (2048, hidden),
        "mlp.experts.255.down_proj.weight": (hidden, 2048),
        **{
            f"mlp.shared_experts.{part}_proj.weight": (hidden, 2048) if part == "down" else (2048, hidden)
            for part in ("gate", "up", "down")
        },
    }


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_config_json(name: str) -> None:
    """Old and new spellings are read as the same model."""
    model = compose([f"model={name}"]).model
    written = config.to_hf(model, "bfloat16")
    back = config.to_model(written)
    assert config.differences(model, back) == {}
    scaling = written.pop("rope_scaling") or {"rope_type": "default"}
    new = {**written, "rope_parameters": {**scaling, "rope_theta": written.pop("rope_theta")}}
    assert asdict(config.to_model({k: v for k, v in new.items() if k != "rope_theta"})) == asdict(back)
    assert config.differences(compose([f"model={name}", "model.hidden_size=128"]).model, back).keys() >= {"hidden_size"}


# As released: huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json, what describes the architecture.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                                            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                                            "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_the_released_config_of_deepseek_v3_is_the_model_of_conf() -> None:
    ours = compose(["model=deepseek_v3", "model.rope_type=yarn"]).model
    assert config.differences(ours, config.to_model(DEEPSEEK_V3)) == {}
    assert config.to_model(DEEPSEEK_V3).mtp_num_layers == 1
    assert config.to_hf(config.to_model(DEEPSEEK_V3), "bfloat16", DEEPSEEK_V3)["rope_scaling"]["type"] == "yarn"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"num_experts_per_tok": 4}, "rank a group by its 1 best experts"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "yarn"}}, "no factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "truncate": False}}, "truncate=False"),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "attention_factor": 2.0}}, "attention_factor=2.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq_factor"),
    ],
)
def test_a_model_that_cannot_be_computed_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        config.to_model({**DEEPSEEK_V3, **change})


def test_a_model_that_its_family_cannot_be_is_not_exported_as_another() -> None:
    """Its config.json would say sigmoid, and transformers would compute something else."""
    model = compose(["model=deepseek_v3", "model.router_score=softmax"]).model
    with pytest.raises(ConfigError, match=r"no config\.json for model\.router_score=softmax"):
        config.to_hf(model, "bfloat16")


def test_another_factor_of_llama_3_is_a_difference() -> None:
    ours, theirs = (
        compose(["model=llama3_8b", "model.rope_type=llama3", f"model.llama3_factor={factor}"]).model
        for factor in (8, 32)
    )
    assert config.differences(ours, theirs) == {"llama3_factor": (8.0, 32.0)}


def test_a_setting_without_a_default_is_named() -> None:
    """transformers' class has no value for it, and its model does not run without one."""
    written = config.to_hf(compose(["model=deepseek_v2"]).model, "bfloat16")
    without = {key: value for key, value in written.items() if key != "num_experts_per_tok"}
    with pytest.raises(CheckpointError, match="no num_experts_per_tok"):
        config.to_model(without)


def test_a_part_without_a_name_in_its_family_is_an_error() -> None:
    model = compose(["model=mixtral_8x7b", "model.num_shared_experts=1"]).model
    with pytest.raises(ConfigError, match=r"family=mixtral has no Hugging Face name for .*shared_experts"):
        pieces(model)


def test_no_two_families_read_one_model_type() -> None:
    types = [kind for family in FAMILIES.values() for kind in family.schema.model_types]
    assert len(types) == len(set(types))
    assert set(FAMILIES) == set(all_fields()["model.family"].choices)
