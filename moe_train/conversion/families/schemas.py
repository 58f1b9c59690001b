"""How each family writes its config.json: one table of settings, and the values of keys that are left out.

The defaults are those of the family's configuration class in transformers (models/*/configuration_*.py), or of the
configuration file that comes with the weights where transformers has no class (`deepseek`, `kimi_k2`). No torch import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_train.config.model import ModelConfig
from parallel.architecture.attention import ATTENTIONS, AttentionKind

Json = dict[str, Any]
OMITTED = object()
"""A key that is not there, or is not to be written."""


@dataclass(frozen=True)
class Setting:
    """One field of config.json and the field of ModelConfig that it is."""

    hf: str
    field: str
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[ModelConfig], Any] | None = None
    """Value for config.json, or OMITTED; None writes the field of ModelConfig."""
    aliases: tuple[str, ...] = ()
    """Other names that versions of transformers write or take for it."""
    nullable: bool = False
    """Whether null has a meaning, which `read` knows."""
    minimum: int | None = None
    """Smallest value in config.json, where `read` would hide a smaller one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name in config.json."""
        return (self.hf, *self.aliases)


@dataclass(frozen=True)
class Schema:
    """How one family writes its config."""

    model_types: tuple[str, ...]
    architecture: str
    settings: tuple[Setting, ...]
    fixed: Mapping[str, Any]
    """ModelConfig fields that are the same in every model of the family."""
    required: Mapping[str, tuple[Any, ...]]
    """config.json fields that must have one of these values where present; the first is written."""
    defaults: Mapping[str, Any]
    """Values of keys that config.json leaves out. One that is not listed must be there."""
    rope_base: float = 10000.0
    """Where config.json names none."""
    rotary_share: float = 1.0
    """Of a head, where config.json does not say (`partial_rotary_factor`)."""
    unnormalised_topk: bool = False
    """The weights of the chosen experts are those of a softmax over all, and `norm_topk_prob` can change that."""
    harmless: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    """Keys of NEUTRAL that this family does not read or that say what it computes anyway: these values (None: any)."""

    @property
    def attention(self) -> AttentionKind:
        """The attention of its models."""
        return ATTENTIONS[self.fixed["attention"]]


def _none_as_zero(value: Any) -> Any:
    return 0 if value is None else value


def _stored_head_dim(model: ModelConfig) -> Any:
    return model.attention_head_dim


def _head_dim_or_null(model: ModelConfig) -> Any:
    return model.head_dim or None


def _unusual_head_dim(model: ModelConfig) -> Any:
    """The class has no such field, but its model reads the attribute where there is one."""
    usual = model.attention_head_dim * model.num_attention_heads == model.hidden_size
    return OMITTED if usual else model.attention_head_dim


def _head_dim(write: Callable[[ModelConfig], Any]) -> Setting:
    return Setting("head_dim", "head_dim", _none_as_zero, write, nullable=True)


_BACKBONE = (
    Setting("num_hidden_layers", "num_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("vocab_size", "vocab_size"),
    Setting("max_position_embeddings", "max_position_embeddings"),
    Setting("tie_word_embeddings", "tie_embeddings"),
    Setting("rms_norm_eps", "norm_epsilon"),
    Setting("initializer_range", "init_std"),
    Setting("num_attention_heads", "num_attention_heads"),
)
_FFN = Setting("intermediate_size", "ffn_hidden_size")
_GROUPS = Setting("num_key_value_heads", "num_query_groups", write=lambda model: model.kv_heads)
_GROUPS_OR_NULL = Setting(
    "num_key_value_heads", "num_query_groups", _none_as_zero, lambda model: model.kv_heads, nullable=True
)
_MLA = (
    Setting("q_lora_rank", "q_lora_rank", _none_as_zero, lambda model: model.q_lora_rank or None, nullable=True),
    Setting("kv_lora_rank", "kv_lora_rank"),
    Setting("qk_nope_head_dim", "qk_nope_head_dim"),
    Setting("qk_rope_head_dim", "qk_rope_head_dim"),
    Setting("v_head_dim", "v_head_dim"),
)
# transformers refuses null for n_shared_experts; DeepSeek's own code reads it as none.
_SHARED = Setting("n_shared_experts", "num_shared_experts", _none_as_zero, nullable=True)
_SHARED_OR_NULL = Setting(
    "n_shared_experts", "num_shared_experts", _none_as_zero, lambda model: model.num_shared_experts or None,
    nullable=True,
)  # fmt: skip
_DEEPSEEK_EXPERTS = (
    Setting("n_routed_experts", "num_experts", aliases=("num_local_experts", "num_experts")),
    Setting("num_experts_per_tok", "topk"),
    Setting("moe_intermediate_size", "moe_ffn_hidden_size"),
    Setting("first_k_dense_replace", "num_dense_layers"),
)


def _groups_of(count: int | None) -> int:
    """One group of all experts limits nothing."""
    return count if count and count > 1 else 0


def _expert_groups(nullable: bool) -> tuple[Setting, ...]:
    return (
        Setting("n_group", "router_num_groups", _groups_of, lambda model: model.router_num_groups or 1,
                nullable=nullable, minimum=1),
        Setting("topk_group", "router_topk_groups", _none_as_zero, lambda model: model.router_topk_groups or 1,
                nullable=nullable, minimum=1),
        Setting("routed_scaling_factor", "router_scaling_factor"),
    )  # fmt: skip


def _experts(width: str, count: str, alias: str) -> tuple[Setting, ...]:
    """Experts, by the name of their inner width, of their number and of its alias in other versions."""
    return (
        Setting(width, "moe_ffn_hidden_size"),
        Setting(count, "num_experts", aliases=(alias,)),
        Setting("num_experts_per_tok", "topk"),
    )


_MTP = Setting("num_nextn_predict_layers", "mtp_num_layers", _none_as_zero, aliases=("num_mtp_layers",), nullable=True)
_SIGMOID = {"router_score": "sigmoid", "router_bias": True, "router_group_score": "sum"}
_GQA = {"attention": "gqa"}
_ACTIVATION = {"hidden_act": ("silu",)}
_EVERY_LAYER = {"moe_layer_freq": (1,)}
_ALL = {"tie_word_embeddings": False, "initializer_range": 0.02}

SCHEMAS: dict[str, Schema] = {
    "deepseek_v3": Schema(
        ("deepseek_v3", "kimi_k2"),
        "DeepseekV3ForCausalLM",
        (*_BACKBONE, _FFN, *_MLA, *_DEEPSEEK_EXPERTS, _SHARED, *_expert_groups(nullable=False), _MTP),
        {"attention": "mla", **_SIGMOID},
        _ACTIVATION | _EVERY_LAYER | {
            "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True,),
            "attention_bias": (False,), "rope_interleave": (True,),
        },
        _ALL | {
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
            "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "num_nextn_predict_layers": 1,
        },
    ),
    "deepseek_v2": Schema(
        ("deepseek_v2",),
        "DeepseekV2ForCausalLM",
        (*_BACKBONE, _FFN, *_MLA, *_DEEPSEEK_EXPERTS, _SHARED, *_expert_groups(nullable=True)),
        {"attention": "mla", "router_score": "softmax", "router_pre_softmax": True, "router_group_score": "max"},
        _ACTIVATION | _EVERY_LAYER | {
            "scoring_func": ("softmax",), "norm_topk_prob": (False,), "attention_bias": (False,),
            "mlp_bias": (False,),
        },
        _ALL | {
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_group": None,
            "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "routed_scaling_factor": 1.0, "topk_group": None, "v_head_dim": 128, "moe_intermediate_size": 1407,
        },
        harmless={"rope_interleave": None},  # pairs are always interleaved
    ),
    "deepseek_moe": Schema(
        ("deepseek",),
        "DeepseekForCausalLM",
        (*_BACKBONE, _FFN, _GROUPS_OR_NULL, *_DEEPSEEK_EXPERTS, _SHARED_OR_NULL),
        _GQA | {"router_score": "softmax", "router_pre_softmax": True},
        _ACTIVATION | _EVERY_LAYER | {
            "scoring_func": ("softmax",), "norm_topk_prob": (False, True), "attention_bias": (False,),
        },
        _ALL | {
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
            "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "n_shared_experts": None,
            "first_k_dense_replace": 0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
        unnormalised_topk=True,
    ),
    "mixtral": Schema(
        ("mixtral",),
        "MixtralForCausalLM",
        (
            *_BACKBONE, _GROUPS_OR_NULL, _head_dim(_head_dim_or_null),
            *_experts("intermediate_size", "num_local_experts", "num_experts"),
        ),
        _GQA | {"router_score": "softmax", "router_pre_softmax": False},
        _ACTIVATION | {"sliding_window": (None,)},
        _ALL | {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8,
        },
        rope_base=1e6,
    ),
    "qwen3_moe": Schema(
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        (
            *_BACKBONE, _FFN, _GROUPS, _head_dim(_stored_head_dim),
            *_experts("moe_intermediate_size", "num_experts", "num_local_experts"),
        ),
        _GQA | {"router_score": "softmax", "qk_norm": "head"},
        _ACTIVATION | {
            "decoder_sparse_step": (1,), "norm_topk_prob": (False, True), "attention_bias": (False,),
            "use_sliding_window": (False,),
        },
        _ALL | {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": None, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        },
        unnormalised_topk=True,
        harmless={"sliding_window": None},  # means nothing without use_sliding_window
    ),
    "qwen2_moe": Schema(
        ("qwen2_moe",),
        "Qwen2MoeForCausalLM",
        (
            *_BACKBONE, _FFN, _GROUPS, _head_dim(_unusual_head_dim),
            *_experts("moe_intermediate_size", "num_experts", "num_local_experts"),
            Setting("shared_expert_intermediate_size", "shared_expert_ffn_hidden_size"),
            Setting("qkv_bias", "qkv_bias"),
        ),
        _GQA | {"router_score": "softmax", "num_shared_experts": 1, "shared_expert_gate": True},
        _ACTIVATION | {
            "decoder_sparse_step": (1,), "norm_topk_prob": (False, True), "use_sliding_window": (False,),
        },
        _ALL | {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": None, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
        },
        unnormalised_topk=True,
        harmless={"sliding_window": None},  # means nothing without use_sliding_window
    ),
    "olmoe": Schema(
        ("olmoe",),
        "OlmoeForCausalLM",
        (
            *_BACKBONE, _GROUPS_OR_NULL, _head_dim(_unusual_head_dim),
            *_experts("intermediate_size", "num_experts", "num_local_experts"),
        ),
        _GQA | {"router_score": "softmax", "qk_norm": "full"},
        _ACTIVATION | {"norm_topk_prob": (False, True), "attention_bias": (False,), "clip_qkv": (None,)},
        _ALL | {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64,
        },
        unnormalised_topk=True,
    ),
    "glm4_moe": Schema(
        ("glm4_moe",),
        "Glm4MoeForCausalLM",
        (
            *_BACKBONE, _FFN, _GROUPS, _head_dim(_stored_head_dim), *_DEEPSEEK_EXPERTS, _SHARED,
            *_expert_groups(nullable=False), _MTP,
            Setting("attention_bias", "qkv_bias"),
            Setting("use_qk_norm", "qk_norm", lambda on: {True: "head", False: "none"}.get(on, on),
                    lambda model: model.qk_norm == "head"),
        ),
        _GQA | _SIGMOID,
        _ACTIVATION | {"norm_topk_prob": (True,)},
        _ALL | {
            "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "attention_bias": False, "moe_intermediate_size": 1408, "num_experts_per_tok": 8,
            "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "use_qk_norm": False, "num_nextn_predict_layers": 1,
        },
        rotary_share=0.5,
        harmless={"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)},
    ),
    "llama": Schema(
        ("llama",),
        "LlamaForCausalLM",
        (*_BACKBONE, _FFN, _GROUPS_OR_NULL, _head_dim(_stored_head_dim)),
        _GQA | {"num_experts": 0},
        _ACTIVATION | {"attention_bias": (False,), "mlp_bias": (False,)},
        _ALL | {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
    ),
}  # fmt: skip

_NONE, _OFF, _ONE = (None, 0), (None, False), (None, 1)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # attention
    "attention_bias": _OFF, "qkv_bias": _OFF, "use_qk_norm": _OFF, "qk_layernorm": _OFF, "clip_qkv": _NONE,
    "sliding_window": _NONE, "use_sliding_window": _OFF, "attention_chunk_size": _NONE, "alibi": _OFF,
    "attn_logit_softcapping": _NONE, "query_pre_attn_scalar": (None,), "attention_multiplier": (None,),
    "no_rope_layers": (None, []), "index_topk": _NONE, "rope_interleave": _OFF,
    # feed-forward
    "mlp_bias": _OFF, "n_shared_experts": _NONE, "num_shared_experts": _NONE, "shared_expert_intermediate_size": _NONE,
    "n_routed_experts": _NONE, "num_local_experts": _NONE, "num_experts": _NONE,
    # routing
    "first_k_dense_replace": _NONE, "mlp_only_layers": (None, []), "decoder_sparse_step": _ONE, "moe_layer_freq": _ONE,
    "interleave_moe_layer_step": _ONE, "n_group": (None, 0, 1), "topk_group": (None, 0, 1),
    "routed_scaling_factor": _ONE, "topk_method": (None, "greedy"), "scoring_func": (None, "softmax"),
    # backbone
    "num_nextn_predict_layers": _NONE, "num_mtp_layers": _NONE, "embedding_multiplier": _ONE, "scale_emb": _ONE,
    "residual_multiplier": _ONE, "logits_scaling": _ONE, "logit_scale": _ONE, "final_logit_softcapping": _NONE,
    "parallel_attn": _OFF, "use_parallel_residual": _OFF, "per_layer_config": (None, {}), "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
}  # fmt: skip
"""Keys that change what a model of some family computes, and the values with which they do not. They count in every
family that has no setting of that name: its own code may read them although transformers ignores them."""
