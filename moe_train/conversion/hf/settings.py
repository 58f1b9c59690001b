"""How a family writes its config.json: a table of settings, and the values of keys that are left out.

Settings here are what several families have in common; a family combines them (`moe_train.conversion.families`).
Its defaults are those of the family's configuration class in transformers (models/*/configuration_*.py), or of the
configuration file that comes with the weights where transformers has no class (`deepseek`, `kimi_k2`). No torch import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from parallel.architecture.attention import ATTENTIONS, AttentionKind
from parallel.errors import CheckpointError

Json = dict[str, Any]
RESTORE = "restore the field from the released config.json"
UNSUPPORTED = "such a model cannot be trained or converted here"
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
    rotary_dim_key: str = ""
    """Key with the rotary dimensions of a head, in families that write it instead of the share."""
    unnormalised_topk: bool = False
    """The weights of the chosen experts are those of a softmax over all, and `norm_topk_prob` can change that."""
    harmless: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    """Keys of NEUTRAL that this family does not read or that say what it computes anyway: these values (None: any)."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of this family alone that would change what it computes, and the values with which they do not."""
    further_keys: tuple[str, ...] = ()
    """Keys that `read_further` reads."""
    read_further: Callable[[Json, Json, Path | str], Json] = lambda config, values, where: {}
    """Fields of ModelConfig that follow from several keys: from config.json, the fields so far, and the file's name."""
    write_further: Callable[[ModelConfig], Json] = lambda model: {}
    """Keys of config.json that follow from several fields."""

    @property
    def attention(self) -> AttentionKind:
        """The attention of its models."""
        return ATTENTIONS[self.fixed["attention"]]

    @property
    def partial_rotary(self) -> bool:
        """Whether a part of a head may be without rotary position."""
        return self.rotary_share != 1 or bool(self.rotary_dim_key)

    @property
    def sigmoid(self) -> bool:
        """Whether its routers score by a sigmoid, with DeepSeek-V3's rules for groups and weights of experts."""
        return bool(self.fixed.get("router_score") == "sigmoid")


def wrong(where: Path | str, name: str, value: Any, why: str) -> CheckpointError:
    """The error of a key with a value that it cannot have."""
    return CheckpointError(f"{where} has {name}={str(value)[:100]!r}, which is {why}", RESTORE)


def leading_layers(layers: Any, where: Path | str) -> int:
    """Number of dense layers, from `mlp_only_layers`: those of Qwen's models here are the first ones."""
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise wrong(where, "mlp_only_layers", layers, "not a list of layers")
    if sorted(layers) != list(range(len(layers))):
        raise CheckpointError(
            f"{where} has mlp_only_layers={layers}, and dense layers here are the first ones", UNSUPPORTED
        )
    return len(layers)


def _read_leading_layers(config: Json, values: Json, where: Path | str) -> Json:
    return {"num_dense_layers": leading_layers(config.get("mlp_only_layers") or [], where)}


def _write_leading_layers(model: ModelConfig) -> Json:
    return {"mlp_only_layers": list(range(model.num_dense_layers))}


LEADING_LAYERS: Any = {
    "further_keys": ("mlp_only_layers",), "read_further": _read_leading_layers, "write_further": _write_leading_layers,
}  # fmt: skip
"""Arguments of the schema of a family that lists its dense layers."""


def none_as_zero(value: Any) -> Any:
    """Null as 0."""
    return 0 if value is None else value


def stored_head_dim(model: ModelConfig) -> Any:
    return model.attention_head_dim


def head_dim_or_null(model: ModelConfig) -> Any:
    return model.head_dim or None


def unusual_head_dim(model: ModelConfig) -> Any:
    """The class has no such field, but its model reads the attribute where there is one."""
    usual = model.attention_head_dim * model.num_attention_heads == model.hidden_size
    return OMITTED if usual else model.attention_head_dim


def head_dim(write: Callable[[ModelConfig], Any]) -> Setting:
    return Setting("head_dim", "head_dim", none_as_zero, write, nullable=True)


BACKBONE = (
    Setting("num_hidden_layers", "num_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("vocab_size", "vocab_size"),
    Setting("max_position_embeddings", "max_position_embeddings"),
    Setting("tie_word_embeddings", "tie_embeddings"),
    Setting("rms_norm_eps", "norm_epsilon"),
    Setting("initializer_range", "init_std"),
    Setting("num_attention_heads", "num_attention_heads"),
)
FFN = Setting("intermediate_size", "ffn_hidden_size")
GROUPS = Setting("num_key_value_heads", "num_query_groups", write=lambda model: model.kv_heads)
GROUPS_OR_NULL = Setting(
    "num_key_value_heads", "num_query_groups", none_as_zero, lambda model: model.kv_heads, nullable=True
)
MLA = (
    Setting("q_lora_rank", "q_lora_rank", none_as_zero, lambda model: model.q_lora_rank or None, nullable=True),
    Setting("kv_lora_rank", "kv_lora_rank"),
    Setting("qk_nope_head_dim", "qk_nope_head_dim"),
    Setting("qk_rope_head_dim", "qk_rope_head_dim"),
    Setting("v_head_dim", "v_head_dim"),
)
# transformers refuses null for n_shared_experts; DeepSeek's own code reads it as none.
SHARED = Setting("n_shared_experts", "num_shared_experts", none_as_zero, nullable=True)
SHARED_OR_NULL = Setting(
    "n_shared_experts", "num_shared_experts", none_as_zero, lambda model: model.num_shared_experts or None,
    nullable=True,
)  # fmt: skip
DEEPSEEK_EXPERTS = (
    Setting("n_routed_experts", "num_experts", aliases=("num_local_experts", "num_experts")),
    Setting("num_experts_per_tok", "topk"),
    Setting("moe_intermediate_size", "moe_ffn_hidden_size"),
    Setting("first_k_dense_replace", "num_dense_layers"),
)


def _groups_of(count: int | None) -> int:
    """One group of all experts limits nothing."""
    return count if count and count > 1 else 0


def expert_groups(nullable: bool) -> tuple[Setting, ...]:
    return (
        Setting("n_group", "router_num_groups", _groups_of, lambda model: model.router_num_groups or 1,
                nullable=nullable, minimum=1),
        Setting("topk_group", "router_topk_groups", none_as_zero, lambda model: model.router_topk_groups or 1,
                nullable=nullable, minimum=1),
        Setting("routed_scaling_factor", "router_scaling_factor"),
    )  # fmt: skip


def experts(width: str, count: str, alias: str) -> tuple[Setting, ...]:
    """Experts, by the name of their inner width, of their number and of its alias in other versions."""
    return (
        Setting(width, "moe_ffn_hidden_size"),
        Setting(count, "num_experts", aliases=(alias,)),
        Setting("num_experts_per_tok", "topk"),
    )


MTP = Setting("num_nextn_predict_layers", "mtp_num_layers", none_as_zero, aliases=("num_mtp_layers",), nullable=True)
SIGMOID = {"router_score": "sigmoid", "router_bias": True, "router_group_score": "sum"}
GQA = {"attention": "gqa"}
ACTIVATION = {"hidden_act": ("silu",)}
EVERY_LAYER = {"moe_layer_freq": (1,)}
ALL = {"tie_word_embeddings": False, "initializer_range": 0.02}

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
