"""config.json of a Hugging Face checkpoint <-> ModelConfig, by the schema of its family. No torch import.

What the model code here cannot compute is refused by name: a checkpoint must never load as another model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.rules import model as model_rules
from moe_train.config.walk import all_fields, violation
from moe_train.conversion.families import FAMILIES
from moe_train.conversion.hf import rope
from moe_train.conversion.hf.rope import YARN_FIELDS
from moe_train.conversion.hf.settings import (
    NEUTRAL,
    OMITTED,
    RESTORE,
    UNSUPPORTED,
    Json,
    Schema,
    Setting,
    wrong,
)
from moe_train.files import untrusted
from parallel.architecture.attention import attention_kind
from parallel.errors import CheckpointError, ConfigError
from parallel.suggest import Impossible, override_value

FILE = "config.json"
_LARGEST_BYTES = 1 << 24

# DeepSeek's code and transformers use this for the norms of latents, regardless of rms_norm_eps.
_LATENT_EPSILON = 1e-6


def read(directory: Path) -> Json:
    """config.json of the checkpoint at `directory`.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = directory / FILE
    try:
        config = untrusted.read_json(path, _LARGEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "name the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "restore the file from a copy") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object", "restore the file from a copy")
    return config


def to_model(config: Json, where: Path | str = FILE) -> ModelConfig:
    """The model that a config.json describes. A key that is left out has the value that its family gives it.

    Raises:
        CheckpointError: its family is unknown, a field is missing, or it asks for what the model code does not have.
    """
    kind = config.get("model_type")
    names = [name for name, family in FAMILIES.items() if kind in family.schema.model_types]
    if not names:
        known = ", ".join(t for family in FAMILIES.values() for t in family.schema.model_types)
        raise CheckpointError(f"{where} has model_type={kind!r}, which is not supported", f"supported are {known}")
    family, schema = names[0], FAMILIES[names[0]].schema
    _refuse_other_computations(config, family, where)
    values: Json = {"name": str(kind), "family": family, **schema.fixed}
    for setting in schema.settings:
        values[setting.field] = _read(setting, config, schema, where)
    values |= _following(config, schema, values)
    values |= schema.read_further(config, values, where)
    try:
        values |= rope.read(config, schema, where)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        scaling = {name: config[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if name in config}
        raise wrong(where, "rotary position", scaling, f"not complete ({type(error).__name__}: {error})") from error
    for field, value in values.items():
        if why := violation(f"model.{field}", value):
            raise wrong(where, field, value, why)
    model = ModelConfig(**{field: _typed(field, value) for field, value in values.items()})
    if unlike := _unlike_transformers(model):
        raise CheckpointError(f"{where} has {unlike}", UNSUPPORTED)
    _check_rules(model, schema, where)
    return model


def _refuse_other_computations(config: Json, family: str, where: Path | str) -> None:
    """Raise CheckpointError where a key asks for what the model code of the family does not compute."""
    schema = FAMILIES[family].schema
    for name, allowed in {**schema.neutral, **schema.required}.items():
        if name in config and config[name] not in allowed:
            raise CheckpointError(
                f"{where} has {name}={config[name]!r}, and the {family} models here have {allowed[0]!r}", UNSUPPORTED
            )
    read = {name for setting in schema.settings for name in setting.names} | schema.required.keys()
    read |= set(schema.further_keys)
    for name, neutral in NEUTRAL.items():
        if name not in config or name in read:
            continue
        harmless = schema.harmless.get(name, neutral)
        if harmless is not None and config[name] not in harmless:
            raise CheckpointError(
                f"{where} has {name}={str(config[name])[:100]}, which the {family} models here do not have", UNSUPPORTED
            )
    layers = config.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise CheckpointError(
            f"{where} has layer_types={str(layers)[:100]}, and every layer here is full_attention", UNSUPPORTED
        )
    count = config.get("num_hidden_layers", schema.defaults["num_hidden_layers"])
    if layers is not None and len(layers) != count:
        raise CheckpointError(f"{where} has layer_types of {len(layers)} layers and num_hidden_layers={count}", RESTORE)
    heads = (
        config.get("num_key_value_heads"),
        config.get("num_attention_heads", schema.defaults["num_attention_heads"]),
    )
    if schema.attention.latent and None not in heads and heads[0] != heads[1]:
        raise CheckpointError(
            f"{where} has num_key_value_heads={heads[0]} and num_attention_heads={heads[1]}, which are the same in "
            f"{family} models",
            UNSUPPORTED,
        )


def _read(setting: Setting, config: Json, schema: Schema, where: Path | str) -> Any:
    """The ModelConfig value of one setting."""
    given = {name: config[name] for name in setting.names if name in config}
    if len({repr(value) for value in given.values()}) > 1:
        shown = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise CheckpointError(f"{where} has {shown}, which are two names of one field", "keep the right one")
    value = next(iter(given.values()), schema.defaults.get(setting.hf, OMITTED))
    if value is OMITTED:
        raise CheckpointError(f"{where} has no {setting.hf}", RESTORE)
    name = next(iter(given), setting.hf)
    if value is None and not setting.nullable:
        raise CheckpointError(f"{where} has {name}=null, which means nothing there", RESTORE)
    below = setting.minimum is not None and type(value) is int and value < setting.minimum
    if below:
        raise wrong(where, name, value, f"below {setting.minimum}")
    try:
        result = setting.read(value)
    except TypeError:
        result = value
    if why := violation(f"model.{setting.field}", result):
        raise wrong(where, name, value, why)
    return result


def _following(config: Json, schema: Schema, values: Json) -> Json:
    """Fields that follow from the others, or from several keys."""
    derived: Json = {}
    if schema.unnormalised_topk:
        derived["router_pre_softmax"] = not config.get("norm_topk_prob", False)
    if values.get("router_num_groups") == 0:
        derived["router_topk_groups"] = 0
    if schema.attention.latent and values["norm_epsilon"] != _LATENT_EPSILON:
        derived["latent_norm_epsilon"] = _LATENT_EPSILON
    if "ffn_hidden_size" not in values:  # every layer has experts
        derived["ffn_hidden_size"] = values["moe_ffn_hidden_size"]
    return derived


def _typed(field: str, value: Any) -> Any:
    """A whole number where JSON has one for a float: transformers insists on the type that it writes."""
    return float(value) if all_fields()[f"model.{field}"].type is float else value


def _check_rules(model: ModelConfig, schema: Schema, where: Path | str) -> None:
    """Raise CheckpointError where no model can be like that, in the words of config.json."""
    names = {setting.field: setting.hf for setting in schema.settings} | {"rope_base": "rope_theta"}
    names |= {field: name for name, field in YARN_FIELDS.items()}
    try:
        model_rules.check(model)
    except Impossible as problem:
        cause = re.sub(r"model\.(\w+)", lambda match: names.get(match[1], match[0]), problem.cause)
        raise CheckpointError(f"{where} cannot be: {cause}", RESTORE) from None


def _unlike_transformers(model: ModelConfig) -> str | None:
    """What of a model's routing Megatron-Core computes otherwise than the family's own code, None where nothing is."""
    if not FAMILIES[model.family].schema.sigmoid or not model.is_moe:
        return None
    if model.topk == 1:
        return "num_experts_per_tok=1, whose weight the family sets to 1 and Megatron-Core does not change"
    if model.router_topk_groups and model.topk // model.router_topk_groups != 2:
        best = model.topk // model.router_topk_groups
        return (
            f"num_experts_per_tok={model.topk} and topk_group={model.router_topk_groups}: Megatron-Core would rank a "
            f"group by its {best} best experts, and the family ranks it by 2"
        )
    return None


def to_hf(model: ModelConfig, dtype: str, original: Json | None = None) -> Json:
    """config.json of `model`: `original` with everything that follows from `model` replaced.

    Args:
        dtype: of the weights, in torch's spelling, such as bfloat16.
        original: config.json that the model once came from, for what only it knows, such as token ids.

    Raises:
        ConfigError: models of this family cannot be like that: another program would compute something else.
    """
    schema = FAMILIES[model.family].schema
    if unlike := _unlike_transformers(model):
        raise ConfigError(
            f"model.family={model.family} cannot have {unlike}", "train with a checkpoint format of Megatron only"
        )
    config: Json = {
        **({} if original is None else original),
        **{name: allowed[0] for name, allowed in schema.required.items()},
        "architectures": [schema.architecture],
        "model_type": (original or {}).get("model_type", schema.model_types[0]),
    }
    for setting in schema.settings:
        for name in setting.names:
            config.pop(name, None)
        written = setting.write(model) if setting.write else getattr(model, setting.field)
        if written is not OMITTED:
            config[setting.hf] = written
    config["num_key_value_heads"] = attention_kind(model).describe(model).core.kv_heads
    if schema.unnormalised_topk:
        config["norm_topk_prob"] = not model.router_pre_softmax
    config |= schema.write_further(model)
    for name in ("rope_parameters", "original_max_position_embeddings", "quantization_config", "partial_rotary_factor"):
        config.pop(name, None)
    config |= rope.write(model)
    if schema.partial_rotary:
        config["partial_rotary_factor"] = model.rotary_percent
    if schema.rotary_dim_key:
        config[schema.rotary_dim_key] = model.rotary_dim
    config |= {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}
    if lost := differences(model, to_model(config)):
        has = " ".join(f"model.{field}={override_value(ours)}" for field, (ours, _) in lost.items())
        can = " ".join(f"model.{field}={override_value(theirs)}" for field, (_, theirs) in lost.items())
        raise ConfigError(f"model.family={model.family} has no config.json for {has}", f"it can have {can}")
    return config


def differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that decide what the weights compute, by name, where two models differ: (ours, theirs).

    With the values of `theirs` in its place, `ours` is that model: nothing else of it counts or contradicts them.
    """
    result: dict[str, tuple[Any, Any]] = {}
    while True:  # a value that follows from others, such as head_dim, may differ once they are set
        pairs = {field: (_shown(ours, field, theirs), _shown(theirs, field, theirs)) for field in _deciding(theirs)}
        differing = {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
        if not differing:
            return result
        result |= differing
        ours = replace(ours, **{field: pair[1] for field, pair in differing.items()})


def _deciding(model: ModelConfig) -> list[str]:
    """Fields that say what weights of `model` compute."""
    fields = ["family", "num_layers", "hidden_size", "vocab_size", "tie_embeddings", "norm_epsilon", "attention"]
    fields += ["num_attention_heads", "qk_norm", "qkv_bias", "latent_norm_epsilon"]
    fields += attention_kind(model).fields
    fields += ["rope_type", "rope_base", "rotary_percent"]
    fields += {"yarn": list(YARN_FIELDS.values()), "llama3": ["llama3_factor"]}.get(model.rope_type, [])
    fields += ["num_experts", "num_dense_layers"] if model.is_moe else ["num_experts"]
    if not model.is_moe or model.num_dense_layers:
        fields.append("ffn_hidden_size")
    if model.is_moe:
        fields += ["topk", "moe_ffn_hidden_size", "num_shared_experts", "router_score", "router_bias"]
        fields += ["router_scaling_factor", "router_num_groups", "router_topk_groups"]
        fields += ["router_pre_softmax"] if model.router_score == "softmax" else []
        fields += ["router_group_score"] if model.router_num_groups else []
    return [*fields, "shared_expert_ffn_hidden_size", "shared_expert_gate"]


def _shown(model: ModelConfig, field: str, theirs: ModelConfig) -> Any:
    """The field's value; where that is a default, the value that it means."""
    if field == "latent_norm_epsilon" and attention_kind(theirs).latent:
        return model.latent_norm_epsilon or model.norm_epsilon
    if field == "num_query_groups":
        return model.kv_heads
    if field == "head_dim":
        return model.attention_head_dim
    if field == "shared_expert_ffn_hidden_size" and theirs.num_shared_experts:
        return model.shared_expert_width
    return getattr(model, field)
