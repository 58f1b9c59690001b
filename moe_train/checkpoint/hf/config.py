"""config.json of a Hugging Face checkpoint <-> ModelConfig, by one table of settings for each family. No torch import.

What the model code here cannot compute is refused by name: a checkpoint must never load as another model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.walk import misfit
from parallel.errors import CheckpointError, ConfigError
from parallel.suggest import override_value

Json = dict[str, Any]
FILE = "config.json"
_MISSING = object()


@dataclass(frozen=True)
class Setting:
    """One field of config.json and the field of ModelConfig that it is."""

    hf: str
    field: str
    default: Any = _MISSING
    """Value where config.json leaves it out; without a default it must be there."""
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    aliases: tuple[str, ...] = ()
    """Other names that versions of transformers write or take for it."""

    def value(self, config: Json) -> Any:
        """What the config says, or the default, or `_MISSING`."""
        return next((config[name] for name in (self.hf, *self.aliases) if name in config), self.default)


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
    rope_base: float = 10000.0
    """Where config.json names none."""
    rotary_share: float = 1.0
    """Of a head, where config.json does not say (`partial_rotary_factor`)."""
    unnormalised_topk: bool = False
    """The weights of the chosen experts are those of a softmax over all, and `norm_topk_prob` can change that."""


def _none_as_zero(value: Any) -> Any:
    return value or 0


def _zero_as_none(value: Any) -> Any:
    return value or None


_BACKBONE = (
    Setting("num_hidden_layers", "num_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("vocab_size", "vocab_size"),
    Setting("max_position_embeddings", "max_position_embeddings"),
    Setting("tie_word_embeddings", "tie_embeddings", False),
    Setting("rms_norm_eps", "norm_epsilon"),
    Setting("initializer_range", "init_std", 0.02),
    Setting("num_attention_heads", "num_attention_heads"),
)
_FFN = Setting("intermediate_size", "ffn_hidden_size")
_GROUPS = Setting("num_key_value_heads", "num_query_groups", None, _none_as_zero)
_HEAD_DIM = Setting("head_dim", "head_dim", 0, _none_as_zero, _zero_as_none)
_MLA = (
    Setting("q_lora_rank", "q_lora_rank", None, _none_as_zero, _zero_as_none),
    Setting("kv_lora_rank", "kv_lora_rank"),
    Setting("qk_nope_head_dim", "qk_nope_head_dim"),
    Setting("qk_rope_head_dim", "qk_rope_head_dim"),
    Setting("v_head_dim", "v_head_dim"),
)
_DEEPSEEK_EXPERTS = (
    Setting("n_routed_experts", "num_experts", aliases=("num_local_experts", "num_experts")),
    Setting("num_experts_per_tok", "topk"),
    Setting("moe_intermediate_size", "moe_ffn_hidden_size"),
    Setting("n_shared_experts", "num_shared_experts", 0, _none_as_zero, _zero_as_none),
    Setting("first_k_dense_replace", "num_dense_layers", 0),
)
_EXPERT_GROUPS = (
    Setting("n_group", "router_num_groups", 1, lambda n: n if n and n > 1 else 0, lambda n: n or 1),
    Setting("topk_group", "router_topk_groups", 1, _none_as_zero, lambda n: n or 1),
    Setting("routed_scaling_factor", "router_scaling_factor", 1.0),
)
_MTP = Setting("num_nextn_predict_layers", "mtp_num_layers", 0, _none_as_zero, aliases=("num_mtp_layers",))
_SIGMOID = {"router_score": "sigmoid", "router_bias": True, "router_group_score": "sum"}
_GQA = {"attention": "gqa"}
_ACTIVATION = {"hidden_act": ("silu",)}
_EVERY_LAYER = {"moe_layer_freq": (1,)}

SCHEMAS: dict[str, Schema] = {
    "deepseek_v3": Schema(
        ("deepseek_v3", "kimi_k2"),
        "DeepseekV3ForCausalLM",
        (*_BACKBONE, _FFN, *_MLA, *_DEEPSEEK_EXPERTS, *_EXPERT_GROUPS, _MTP),
        {"attention": "mla", **_SIGMOID},
        _ACTIVATION | _EVERY_LAYER | {
            "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True,),
            "attention_bias": (False,), "rope_interleave": (True,),
        },
    ),
    "deepseek_v2": Schema(
        ("deepseek_v2",),
        "DeepseekV2ForCausalLM",
        (*_BACKBONE, _FFN, *_MLA, *_DEEPSEEK_EXPERTS, *_EXPERT_GROUPS),
        {"attention": "mla", "router_score": "softmax", "router_pre_softmax": True, "router_group_score": "max"},
        _ACTIVATION | _EVERY_LAYER | {
            "scoring_func": ("softmax",), "norm_topk_prob": (False,), "attention_bias": (False,),
            "mlp_bias": (False,),
        },
    ),
    "deepseek_moe": Schema(
        ("deepseek",),
        "DeepseekForCausalLM",
        (*_BACKBONE, _FFN, _GROUPS, *_DEEPSEEK_EXPERTS),
        _GQA | {"router_score": "softmax", "router_pre_softmax": True},
        _ACTIVATION | _EVERY_LAYER | {
            "scoring_func": ("softmax",), "norm_topk_prob": (False, True), "attention_bias": (False,),
        },
        unnormalised_topk=True,
    ),
    "mixtral": Schema(
        ("mixtral",),
        "MixtralForCausalLM",
        (
            *_BACKBONE, _GROUPS, _HEAD_DIM,
            Setting("intermediate_size", "moe_ffn_hidden_size"),
            Setting("num_local_experts", "num_experts", aliases=("num_experts",)),
            Setting("num_experts_per_tok", "topk"),
        ),
        _GQA | {"router_score": "softmax", "router_pre_softmax": False},
        _ACTIVATION | {"sliding_window": (None,), "attention_bias": (False,)},
        rope_base=1e6,
    ),
    "qwen3_moe": Schema(
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        (
            *_BACKBONE, _FFN, _GROUPS, _HEAD_DIM,
            Setting("moe_intermediate_size", "moe_ffn_hidden_size"),
            Setting("num_experts", "num_experts", aliases=("num_local_experts",)),
            Setting("num_experts_per_tok", "topk"),
        ),
        _GQA | {"router_score": "softmax", "qk_norm": "head"},
        _ACTIVATION | {
            "decoder_sparse_step": (1,), "norm_topk_prob": (False, True), "attention_bias": (False,),
            "use_sliding_window": (False,),
        },
        unnormalised_topk=True,
    ),
    "qwen2_moe": Schema(
        ("qwen2_moe",),
        "Qwen2MoeForCausalLM",
        (
            *_BACKBONE, _FFN, _GROUPS,
            Setting("moe_intermediate_size", "moe_ffn_hidden_size"),
            Setting("shared_expert_intermediate_size", "shared_expert_ffn_hidden_size"),
            Setting("num_experts", "num_experts", aliases=("num_local_experts",)),
            Setting("num_experts_per_tok", "topk"),
            Setting("qkv_bias", "qkv_bias", True),
        ),
        _GQA | {"router_score": "softmax", "num_shared_experts": 1, "shared_expert_gate": True},
        _ACTIVATION | {
            "decoder_sparse_step": (1,), "norm_topk_prob": (False, True), "use_sliding_window": (False,),
        },
        unnormalised_topk=True,
    ),
    "olmoe": Schema(
        ("olmoe",),
        "OlmoeForCausalLM",
        (
            *_BACKBONE, _GROUPS,
            Setting("intermediate_size", "moe_ffn_hidden_size"),
            Setting("num_experts", "num_experts", aliases=("num_local_experts",)),
            Setting("num_experts_per_tok", "topk"),
        ),
        _GQA | {"router_score": "softmax", "qk_norm": "full"},
        _ACTIVATION | {"norm_topk_prob": (False, True), "attention_bias": (False,), "clip_qkv": (None,)},
        unnormalised_topk=True,
    ),
    "glm4_moe": Schema(
        ("glm4_moe",),
        "Glm4MoeForCausalLM",
        (
            *_BACKBONE, _FFN, _GROUPS, _HEAD_DIM, *_DEEPSEEK_EXPERTS, *_EXPERT_GROUPS, _MTP,
            Setting("attention_bias", "qkv_bias", False),
            Setting("use_qk_norm", "qk_norm", False, lambda on: "head" if on else "none", lambda norm: norm == "head"),
        ),
        _GQA | _SIGMOID,
        _ACTIVATION | {"norm_topk_prob": (True,)},
        rotary_share=0.5,
    ),
    "llama": Schema(
        ("llama",),
        "LlamaForCausalLM",
        (*_BACKBONE, _FFN, _GROUPS, _HEAD_DIM),
        _GQA | {"num_experts": 0},
        _ACTIVATION | {"attention_bias": (False,), "mlp_bias": (False,)},
    ),
}  # fmt: skip

# DeepSeek's code and transformers use this for the norms of latents, whatever rms_norm_eps says.
_LATENT_EPSILON = 1e-6
_YARN = {
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_max_position",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(directory: Path) -> Json:
    """config.json of the checkpoint at `directory`.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = directory / FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "name the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "restore the file from a copy") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object", "restore the file from a copy")
    return config


def to_model(config: Json, where: Path | str = FILE) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        CheckpointError: its family is unknown, a field is missing, or it asks for what the model code does not have.
    """
    kind = config.get("model_type")
    found = [name for name, schema in SCHEMAS.items() if kind in schema.model_types]
    if not found:
        known = ", ".join(t for schema in SCHEMAS.values() for t in schema.model_types)
        raise CheckpointError(f"{where} has model_type={kind!r}, which is not supported", f"supported are {known}")
    schema = SCHEMAS[found[0]]
    for name, allowed in schema.required.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(
                f"{where} has {name}={config[name]!r}, and the {found[0]} models here have {allowed[0]!r}",
                "such a model cannot be trained or converted here",
            )
    values: Json = {"name": str(kind), "family": found[0], **schema.fixed}
    for setting in schema.settings:
        value = setting.value(config)
        if value is _MISSING:
            raise CheckpointError(f"{where} has no {setting.hf}", "restore the field from the released config.json")
        try:
            values[setting.field] = setting.read(value)
        except TypeError:
            values[setting.field] = value
        if why := misfit(f"model.{setting.field}", values[setting.field]):
            raise _wrong(where, setting.hf, value, why)
    if schema.unnormalised_topk:
        values["router_pre_softmax"] = not config.get("norm_topk_prob", False)
    if values.get("router_num_groups") == 0:
        values["router_topk_groups"] = 0
    if found[0] == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        values |= {"router_num_groups": 0, "router_topk_groups": 0, "router_group_score": "sum"}
    if "mlp_only_layers" in config and found[0].startswith("qwen"):
        values["num_dense_layers"] = _leading_layers(config["mlp_only_layers"] or [], where)
    if values.get("attention") == "mla" and values["norm_epsilon"] != _LATENT_EPSILON:
        values["latent_norm_epsilon"] = _LATENT_EPSILON
    if found[0] in ("mixtral", "olmoe"):
        values["ffn_hidden_size"] = values["moe_ffn_hidden_size"]
    try:
        values |= _rope(config, schema, where)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        scaling = {name: config[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if name in config}
        raise _wrong(where, "rotary position", scaling, f"not complete ({type(error).__name__}: {error})") from error
    for field, value in values.items():
        if why := misfit(f"model.{field}", value):
            raise _wrong(where, field, value, why)
    model = ModelConfig(**values)
    if wrong := _unlike_transformers(model):
        raise CheckpointError(f"{where} has {wrong}", "such a model cannot be trained or converted here")
    return model


def _unlike_transformers(model: ModelConfig) -> str | None:
    """What of a model's routing Megatron-Core computes otherwise than the family's own code, None where nothing is."""
    if model.family not in ("deepseek_v3", "glm4_moe") or not model.is_moe:
        return None
    if model.topk == 1:
        return "num_experts_per_tok=1, whose weight the family makes 1 and Megatron-Core leaves as it is"
    if model.router_num_groups and model.topk // model.router_topk_groups != 2:
        best = model.topk // model.router_topk_groups
        return (
            f"num_experts_per_tok={model.topk} and topk_group={model.router_topk_groups}: Megatron-Core would rank a "
            f"group by its {best} best experts, and the family ranks it by 2"
        )
    return None


def _wrong(where: Path | str, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has {name}={str(value)[:100]!r}, which is {why}", "restore the field from the released config.json"
    )


def _leading_layers(layers: Any, where: Path | str) -> int:
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise _wrong(where, "mlp_only_layers", layers, "no list of layers")
    if sorted(layers) != list(range(len(layers))):
        raise CheckpointError(
            f"{where} has mlp_only_layers={layers}, and dense layers here are the first ones",
            "such a model cannot be trained or converted here",
        )
    return len(layers)


def _rope(config: Json, schema: Schema, where: Path | str) -> Json:
    """Position fields, from `rope_theta` and `rope_scaling` or, as transformers 5 writes them, `rope_parameters`."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or schema.rotary_share
    if share != 1 and schema.rotary_share == 1:
        raise CheckpointError(
            f"{where} has partial_rotary_factor={share}, and models of its family here have 1",
            "such a model cannot be trained or converted here",
        )
    base = scaling.get("rope_theta") or config.get("rope_theta") or schema.rope_base
    values: Json = {"rope_base": float(base), "rotary_percent": float(share)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return values | {"rope_type": "rope"}
    if kind not in ("yarn", "llama3"):
        raise CheckpointError(
            f"{where} scales rotary positions by {kind!r}",
            "supported are default, yarn and llama3 with its usual factors",
        )
    if scaling.get("factor") is None:
        raise CheckpointError(
            f"{where} scales rotary positions by {kind!r} and has no factor", "restore the released config.json"
        )
    given = {name: value for name, value in scaling.items() if value is not None}
    usual = _LLAMA3 if kind == "llama3" else {"truncate": True}
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned", "factor", *usual}
    known |= _YARN.keys() if kind == "yarn" else set()
    odd = {name: value for name, value in given.items() if name not in known or value != usual.get(name, value)}
    odd |= {name: None for name in (_LLAMA3 if kind == "llama3" else ()) if name not in given}
    if odd:
        shown = " ".join(f"{name}={value}" for name, value in odd.items())
        raise CheckpointError(
            f"{where} scales rotary positions by {kind!r} with {shown}",
            "supported are default, yarn and llama3 with its usual factors",
        )
    if kind == "llama3":
        return values | {"rope_type": "llama3", "llama3_factor": float(given["factor"])}
    yarn = {"original_max_position_embeddings": config.get("max_position_embeddings"), **_YARN_DEFAULTS, **given}
    return values | {"rope_type": "yarn"} | {field: yarn[name] for name, field in _YARN.items()}


def to_hf(model: ModelConfig, dtype: str, original: Json | None = None) -> Json:
    """config.json of `model`: `original` with everything that follows from `model` set anew.

    Args:
        dtype: of the weights, in torch's spelling, such as bfloat16.
        original: config.json that the model once came from, for what only it knows, such as token ids.

    Raises:
        ConfigError: models of this family cannot be like that: another program would compute something else.
    """
    schema = SCHEMAS[model.family]
    if wrong := _unlike_transformers(model):
        raise ConfigError(
            f"model.family={model.family} cannot have {wrong}", "train with a checkpoint format of Megatron only"
        )
    config: Json = {
        **({} if original is None else original),
        **{name: allowed[0] for name, allowed in schema.required.items()},
        "architectures": [schema.architecture],
        "model_type": (original or {}).get("model_type", schema.model_types[0]),
    }
    for setting in schema.settings:
        for name in setting.aliases:
            config.pop(name, None)
        config[setting.hf] = setting.write(getattr(model, setting.field))
    config["num_key_value_heads"] = model.kv_heads if model.attention == "gqa" else model.num_attention_heads
    if schema.unnormalised_topk:
        config["norm_topk_prob"] = not model.router_pre_softmax
    if model.family == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy" if model.router_num_groups else "greedy"
    if model.family.startswith("qwen"):
        config["mlp_only_layers"] = list(range(model.num_dense_layers))
    for name in ("rope_parameters", "quantization_config", "partial_rotary_factor"):
        config.pop(name, None)
    config |= {"rope_theta": model.rope_base, "rope_scaling": _rope_scaling(model)}
    if schema.rotary_share != 1:
        config["partial_rotary_factor"] = model.rotary_percent
    config |= {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}
    if lost := differences(model, to_model(config)):
        has = " ".join(f"model.{field}={override_value(ours)}" for field, (ours, _) in lost.items())
        can = " ".join(f"model.{field}={override_value(theirs)}" for field, (_, theirs) in lost.items())
        raise ConfigError(f"model.family={model.family} has no config.json for {has}", f"it can have {can}")
    return config


def _rope_scaling(model: ModelConfig) -> Json | None:
    if model.rope_type == "yarn":
        kind = {"type": "yarn", "rope_type": "yarn"}
        return kind | {name: getattr(model, field) for name, field in _YARN.items()}
    if model.rope_type == "llama3":
        return {"type": "llama3", "rope_type": "llama3", "factor": model.llama3_factor, **_LLAMA3}
    return None


def differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide what the weights compute, by name, where two models differ: (ours, theirs)."""
    compared = [s.field for s in SCHEMAS[theirs.family].settings] + list(SCHEMAS[theirs.family].fixed)
    compared += ["family", "router_pre_softmax", "num_dense_layers", "latent_norm_epsilon"]
    compared += ["rope_type", "rope_base", "rotary_percent"]
    compared += {"yarn": list(_YARN.values()), "llama3": ["llama3_factor"]}.get(theirs.rope_type, [])
    ours = replace(ours, latent_norm_epsilon=ours.latent_norm_epsilon or ours.norm_epsilon)
    theirs = replace(theirs, latent_norm_epsilon=theirs.latent_norm_epsilon or theirs.norm_epsilon)
    skipped = {"init_std", "max_position_embeddings", "mtp_num_layers"}
    pairs = {f: (_shown(ours, f), _shown(theirs, f)) for f in dict.fromkeys(compared) if f not in skipped}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _shown(model: ModelConfig, field: str) -> Any:
    defaults = {"num_query_groups": model.kv_heads, "head_dim": model.attention_head_dim}
    return defaults.get(field, getattr(model, field)) if model.attention == "gqa" else getattr(model, field)
