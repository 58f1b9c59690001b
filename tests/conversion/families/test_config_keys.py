"""Each key of each family's config.json left out, and set to null: transformers' configuration class is the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_train.config.model import ModelConfig
from moe_train.conversion import hf_config as config
from moe_train.conversion.hf import rope
from parallel.errors import CheckpointError
from tests.conversion import reference

Json = dict[str, Any]

# None of these is a default, but for topk_group = topk / 2 of DeepSeek-V3: Megatron-Core needs that quotient.
BACKBONE: Json = {
    "vocab_size": 301, "hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-4, "tie_word_embeddings": True,
    "initializer_range": 0.03, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
}  # fmt: skip
MLA: Json = {
    "num_key_value_heads": 64, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "intermediate_size": 96, "moe_intermediate_size": 34, "n_routed_experts": 96,
    "n_shared_experts": 3, "num_experts_per_tok": 8, "first_k_dense_replace": 2, "n_group": 16, "topk_group": 4,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
YARN: Json = {
    "rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 30.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.8,
}  # fmt: skip
EXPERTS: Json = {
    "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 34, "intermediate_size": 96,
    "norm_topk_prob": True, "mlp_only_layers": [0, 1],
}  # fmt: skip
GLM: Json = {
    "moe_intermediate_size": 34, "intermediate_size": 96, "num_experts_per_tok": 2, "head_dim": 24,
    "n_routed_experts": 12, "n_shared_experts": 2, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5,
    "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 2,
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.25},
}  # fmt: skip
LLAMA3: Json = {
    "rope_theta": 5e5, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES: dict[str, tuple[str, Json]] = {
    "deepseek_v3": ("DeepseekV3", {**MLA, "num_nextn_predict_layers": 2}),
    "deepseek_v3 yarn": ("DeepseekV3", {**MLA, "rope_parameters": YARN}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "topk_method": "group_limited_greedy"}),
    "mixtral": ("Mixtral", {"num_local_experts": 12, "num_experts_per_tok": 3, "intermediate_size": 48}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 24}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "head_dim": 24, "shared_expert_intermediate_size": 40, "qkv_bias": False}),
    "olmoe": ("Olmoe", {**EXPERTS, "head_dim": 24}),
    "glm4_moe": ("Glm4Moe", GLM),
    "glm4_moe groups": ("Glm4Moe", {**GLM, "n_group": 4}),
    "glm4_moe_lite": ("Glm4MoeLite", {**MLA, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 3}),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "intermediate_size": 48,
            "head_dim": 24,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.25},
        },
    ),
    "llama": ("Llama", {"intermediate_size": 96, "head_dim": 24}),
    "llama yarn": ("Llama", {"intermediate_size": 96, "rope_parameters": YARN}),
    "llama3": ("Llama", {"intermediate_size": 96, "rope_parameters": LLAMA3}),
    "deepseek": ("", {**MLA, "num_key_value_heads": 2, "norm_topk_prob": True, "rope_theta": 5e5}),
}
UNUSED = {
    "deepseek": ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_group",
                 "topk_group", "routed_scaling_factor", "rope_parameters"),
    "olmoe": ("moe_intermediate_size", "mlp_only_layers"),
}  # fmt: skip

# What is refused although transformers' class takes it, and why.
REFUSED = {
    ("*", "model_type"): "not supported",  # transformers has the class, we have only the file
    ("deepseek_v2", "num_experts_per_tok"): "no num_experts_per_tok",  # null there, and the model needs a number
    ("deepseek_v2", "n_group"): "no n_group",  # the same
    ("deepseek_v2", "topk_group"): "no topk_group",
    ("glm4_moe groups", "num_experts_per_tok"): "rank a group by its 8 best",  # what Megatron-Core has is another rule
    ("deepseek_v3", "num_attention_heads"): "num_key_value_heads=64 and num_attention_heads=128",  # needs as many
    ("deepseek_v3 yarn", "num_attention_heads"): "num_key_value_heads=64 and num_attention_heads=128",
    ("deepseek_v2", "num_attention_heads"): "num_key_value_heads=64 and num_attention_heads=32",
    ("deepseek_v3 yarn", "mscale"): "DeepSeek's code multiplies",  # and transformers by something else
    ("deepseek_v3 yarn", "mscale_all_dim"): "DeepSeek's code multiplies",
    ("deepseek_v3 yarn", "factor"): "no factor",
    ("llama yarn", "factor"): "no factor",
    ("llama3", "original_max_position_embeddings"): "original_max_position_embeddings=256",
    ("glm4_moe_lite", "num_attention_heads"): "num_key_value_heads=64 and num_attention_heads=20",
    ("glm4_moe_lite", "num_hidden_layers"): "not a list of 47 layers",  # transformers takes the list of 5
    ("glm4_moe_lite", "mlp_layer_types"): "first_k_dense_replace=2 and no mlp_layer_types",
    ("glm4_moe_lite", "num_experts_per_tok"): "rank a group by its 1 best",
    ("glm4_moe_lite", "topk_group"): "rank a group by its 8 best",
    ("deepseek", "n_routed_experts"): "no n_routed_experts",  # a dense model, which is a Llama
    ("deepseek", "num_experts_per_tok"): "no num_experts_per_tok",
}
# Null where transformers' class wants a number and the authors' own code takes it for none.
NULL_IS_NONE = {"n_shared_experts", "num_nextn_predict_layers", "num_mtp_layers", "num_key_value_heads"}
# What says nothing of what the weights compute.
NOT_READ = {
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "attention_dropout", "use_cache",
    "chunk_size_feed_forward", "is_encoder_decoder", "max_window_layers", "pretraining_tp",
}  # fmt: skip


def full(case: str) -> Json:
    """Every key that the class has."""
    stem, settings = CASES[case]
    settings = {**BACKBONE, **settings}
    if not stem:
        return {**reference.DEEPSEEK_MOE_DEFAULTS, "model_type": "deepseek"} | _used(case, settings)
    return _as_json(getattr(transformers, f"{stem}Config")(**_used(case, settings)))


def _used(case: str, settings: Json) -> Json:
    return {key: value for key, value in settings.items() if key not in UNUSED.get(case, ())}


def _as_json(found: Any) -> Json:
    written: Json = json.loads(found.to_json_string(use_diff=False))
    return written


def judged(case: str, given: Json) -> Json:
    """What transformers makes of `given`: every key with the value that its class takes."""
    stem, _ = CASES[case]
    if not stem:
        return {**reference.DEEPSEEK_MOE_DEFAULTS, **given}
    return _as_json(getattr(transformers, f"{stem}Config").from_dict(json.loads(json.dumps(given))))


def releases_spelling(case: str) -> Json:
    """The same model as we write it: `rope_theta`, `rope_scaling`."""
    return config.to_hf(config.to_model(full(case)), "bfloat16")


def _changed(whole: Json, null: bool) -> Iterator[tuple[str, Json]]:
    """Each key in turn, with the config without it or with null for it; keys of rotary scaling too."""
    for key, value in whole.items():
        rest = {k: v for k, v in whole.items() if k != key}
        yield key, rest | ({key: None} if null else {})
        if isinstance(value, dict) and key.startswith("rope"):
            for inner, without in _changed(value, null):
                yield inner, rest | {key: without}


def same(ours: ModelConfig, theirs: ModelConfig) -> bool:
    """The same models, whether a size is given or follows from others."""
    filled = [
        asdict(model) | {"num_query_groups": model.kv_heads, "head_dim": model.attention_head_dim}
        for model in (ours, theirs)
    ]
    return filled[0] == filled[1]


def _outcome(given: Json) -> ModelConfig | str:
    try:
        return config.to_model(given)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("spelling", [full, releases_spelling])
@pytest.mark.parametrize("case", CASES)
def test_a_key_that_is_left_out_has_the_value_of_transformers_class(case: str, spelling: Any) -> None:
    for key, reduced in _changed(spelling(case), null=False):
        if key == "num_key_value_heads" and "q_lora_rank" in reduced:
            continue  # multi-latent attention has as many as heads, and transformers' default for it fails in its model
        expected = REFUSED.get((case, key)) or REFUSED.get(("*", key))
        ours = _outcome(reduced)
        if expected:
            assert expected in str(ours), key
            continue
        try:
            theirs = judged(case, reduced)
        except Exception:  # KeyError, ValueError, and those of huggingface_hub's strict dataclasses
            assert isinstance(ours, str), f"{key}: transformers refuses it"
            continue
        assert isinstance(ours, ModelConfig), f"{key}: {ours}"
        assert same(ours, config.to_model(theirs)), key


@pytest.mark.parametrize("case", CASES)
def test_null_means_what_it_means_to_transformers(case: str) -> None:
    """Or it is refused, where transformers' class takes null and its model then fails."""
    for key, given in _changed(full(case), null=True):
        ours = _outcome(given)
        try:
            theirs = judged(case, given)
        except Exception:
            assert isinstance(ours, str) or key in NULL_IS_NONE | NOT_READ, f"{key}: transformers refuses null"
            continue
        if isinstance(ours, ModelConfig):
            assert same(ours, config.to_model(theirs)), key


def test_a_config_with_nothing_but_its_type_is_the_model_of_transformers_class() -> None:
    """Where the class itself describes a model: 96 heads of GLM's share its 4,096 dimensions unevenly."""
    for kind in (
        "deepseek_v3", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe_lite", "minimax_m2", "llama",
    ):  # fmt: skip
        theirs = _as_json(transformers.CONFIG_MAPPING[kind]())
        assert same(config.to_model({"model_type": kind}), config.to_model(theirs)), kind


ONLY_TRANSFORMERS: list[Json] = [
    {"mscale": 0.7}, {"mscale_all_dim": 0.8}, {"mscale": 0.0, "mscale_all_dim": 0.0}, {"attention_factor": 1.25},
    {"attention_factor": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("given", [
    {}, {"mscale": 1.0}, {"mscale": 0.7}, {"mscale_all_dim": 0.8}, {"mscale": 0.7, "mscale_all_dim": 0.8},
    {"mscale": 0.0, "mscale_all_dim": 0.0}, {"attention_factor": 1.25}, {"attention_factor": 1.0},
    {"mscale": 0.7, "attention_factor": 1.0970406052783923},
])  # fmt: skip
@pytest.mark.parametrize("case", ["llama yarn", "deepseek_v3 yarn"])
def test_yarn_multiplies_cos_and_sin_by_what_transformers_does_or_is_refused(case: str, given: Json) -> None:
    """With only one of mscale and mscale_all_dim, DeepSeek's code and transformers compute different numbers."""
    scaling = {key: value for key, value in YARN.items() if not key.startswith("mscale")} | given
    written = full(case) | {"rope_parameters": scaling}
    theirs = getattr(transformers, f"{CASES[case][0]}Config").from_dict(written)
    factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1]
    if case != "llama yarn" and given in ONLY_TRANSFORMERS:
        with pytest.raises(CheckpointError, match="DeepSeek's code multiplies cos and sin"):
            config.to_model(written)
        return
    model = config.to_model(written)
    ours = rope.temperature(4.0, model.yarn_mscale) / rope.temperature(4.0, model.yarn_mscale_all_dim)
    assert ours == pytest.approx(factor, rel=1e-9)
    exported = getattr(transformers, f"{CASES[case][0]}Config").from_dict(config.to_hf(model, "bfloat16"))
    assert ROPE_INIT_FUNCTIONS["yarn"](exported, "cpu")[1] == pytest.approx(factor, rel=1e-9)


def test_the_remedy_for_one_temperature_works() -> None:
    written = full("deepseek_v3 yarn")
    del written["rope_parameters"]["mscale_all_dim"]
    with pytest.raises(CheckpointError, match=r"or attention_factor=(\S+),") as caught:
        config.to_model(written)
    factor = float(str(caught.value).partition("or attention_factor=")[2].partition(",")[0])
    written["rope_parameters"]["attention_factor"] = factor
    assert config.to_model(written).yarn_mscale == 0.7


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps='nan', which is not finite"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 is not above 0"),
        ("llama", {"rope_parameters": {"rope_theta": 0, "rope_type": "default"}}, "rope_theta=0.0 is not above 0"),
        ("llama", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, "rotary position"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=64"),
        ("llama", {"sliding_window": 128}, "sliding_window=128"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"num_experts": 8}, "num_experts=8"),
        ("llama", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, "layer_types"),
        ("mixtral", {"num_experts_per_tok": 13}, "num_experts_per_tok=13 exceeds num_local_experts=12"),
        ("mixtral", {"num_experts": 9}, "num_local_experts=12 and num_experts=9"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("mixtral", {"num_experts_per_tok": 0}, "below 1"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [1, 3]}, "mlp_only_layers"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2_moe", {"layer_types": ["full_attention"] * 4}, "layer_types of 4 layers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("glm4_moe", {"use_qk_norm": "yes"}, "use_qk_norm='yes'"),
        ("glm4_moe", {"n_group": 0}, "n_group='0', which is below 1"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", *["sparse"] * 3]}, "dense layers here are the first"),
        ("glm4_moe_lite", {"mlp_layer_types": "dense"}, "mlp_layer_types='dense', which is not a list of 5 layers"),
        ("glm4_moe_lite", {"first_k_dense_replace": 1}, "first_k_dense_replace=1 and 2 dense layers"),
        ("glm4_moe_lite", {"rope_interleave": False}, "rope_interleave=False"),
        ("minimax_m2", {"attn_type_list": [1, 1, 0, 1, 1]}, "attn_type_list=[1, 1, 0, 1, 1]"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head'"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias=False"),
        ("minimax_m2", {"shared_intermediate_size": 1536}, "shared_intermediate_size=1536"),
        ("minimax_m2", {"sliding_window": 4096}, "sliding_window=4096"),
        ("minimax_m2", {"num_experts_per_tok": 1}, "whose weight the family sets to 1"),
        ("deepseek_v3", {"n_group": 7}, "n_group=7 does not divide n_routed_experts=96"),
        ("deepseek_v3", {"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads=8 and num_attention_heads=64"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk=2048"),
        ("deepseek_v2", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek_v2", {"first_k_dense_replace": 9}, "first_k_dense_replace=9 of num_hidden_layers=5"),
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ],
)
def test_a_value_without_a_meaning_here_is_refused_by_its_name(case: str, change: Json, named: str) -> None:
    found = _outcome(full(case) | change)
    assert isinstance(found, str)
    assert named in found


def test_whole_numbers_become_what_transformers_insists_on() -> None:
    """It refuses 1 for a float, which releases have."""
    model = config.to_model(full("deepseek_v3") | {"routed_scaling_factor": 2})
    written = config.to_hf(model, "bfloat16")
    assert transformers.DeepseekV3Config.from_dict(written).routed_scaling_factor == 2.0


def test_a_model_without_shared_experts_is_written_as_transformers_reads_it() -> None:
    model = config.to_model(full("deepseek_v3") | {"n_shared_experts": 0})
    assert transformers.DeepseekV3Config.from_dict(config.to_hf(model, "bfloat16")).n_shared_experts == 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_as_the_same_model(case: str) -> None:
    model = config.to_model(full(case))
    assert same(config.to_model(config.to_hf(model, "bfloat16")), model)


def test_minimax_releases_count_rotary_dimensions() -> None:
    """`rotary_dim` is what the release has; a share that is given too decides, as in transformers."""
    written = full("minimax_m2") | {"rotary_dim": 12, "attn_type_list": [1] * 5}
    written["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert config.to_model(written).rotary_percent == 0.5
    assert same(config.to_model(written), config.to_model(judged("minimax_m2", written)))
    assert config.to_model(written | {"partial_rotary_factor": 0.25}).rotary_percent == 0.25
    assert config.to_hf(config.to_model(written), "bfloat16", written)["rotary_dim"] == 12
    changed = config.to_model(full("minimax_m2"))
    assert config.to_hf(changed, "bfloat16", written)["rotary_dim"] == 6
