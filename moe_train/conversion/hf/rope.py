"""Rotary positions in config.json <-> ModelConfig. No torch import.

`rope_theta` and `rope_scaling` are the keys of releases, `rope_parameters` holds both in what transformers 5 writes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.conversion.hf.settings import UNSUPPORTED, Json, Schema
from parallel.errors import CheckpointError

YARN_FIELDS = {
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_max_position",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SUPPORTED = "supported are default, yarn and llama3 with its usual factors"
_TOLERANCE = 1e-9  # of attention_factor, which is a rounded number in JSON


def read(config: Json, schema: Schema, where: Path | str) -> Json:
    """Position fields of ModelConfig.

    Raises:
        CheckpointError: positions are scaled in a way that the model code does not have, or that programs disagree on.
    """
    scaling = _scaling(config, where)
    share = _share(config, scaling, schema)
    if share != 1 and not schema.partial_rotary:
        raise CheckpointError(
            f"{where} has partial_rotary_factor={share}, and models of its family here have 1", UNSUPPORTED
        )
    base: Any = scaling.get("rope_theta", config.get("rope_theta", schema.rope_base))
    values: Json = {"rope_base": float(base), "rotary_percent": float(share)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn", "llama3"):
        raise CheckpointError(f"{where} scales rotary positions by {kind!r}", _SUPPORTED)
    if kind == "default":
        return values | {"rope_type": "rope"}
    if scaling.get("factor") is None:
        raise CheckpointError(
            f"{where} scales rotary positions by {kind!r} and has no factor", "restore the released config.json"
        )
    _refuse_odd(kind, scaling, where)
    if kind == "llama3":
        return values | {"rope_type": "llama3", "llama3_factor": float(scaling["factor"])}
    return values | {"rope_type": "yarn"} | _yarn(scaling, schema, where)


def _scaling(config: Json, where: Path | str) -> Json:
    """`rope_scaling` or `rope_parameters`, with the original context filled in as transformers does."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if old and new and old != new:
        raise CheckpointError(
            f"{where} has rope_scaling and another rope_parameters, of which transformers reads the first only",
            "keep the one that the model was trained with",
        )
    scaling: Json = {**(old or new)}
    if nested := [name for name, value in scaling.items() if isinstance(value, dict)]:
        raise CheckpointError(f"{where} has rotary positions of their own for {nested[0]} layers", UNSUPPORTED)
    context = config.get("max_position_embeddings")
    scaling.setdefault("original_max_position_embeddings", context)
    if "original_max_position_embeddings" in config:  # transformers gives this one priority
        scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return scaling


def _share(config: Json, scaling: Json, schema: Schema) -> Any:
    """Of a head that carries position. In a family with a share of its own, null is transformers' word for 1."""
    if "partial_rotary_factor" in scaling:
        return scaling["partial_rotary_factor"]
    share = config.get("partial_rotary_factor", schema.rotary_share)
    if share is not None and "partial_rotary_factor" not in config and config.get(schema.rotary_dim_key) is not None:
        head = config.get("head_dim", schema.defaults["head_dim"])
        return config[schema.rotary_dim_key] / head
    return 1.0 if share is None else share


def _refuse_odd(kind: str, scaling: Json, where: Path | str) -> None:
    """Raise CheckpointError where the scaling has a key, or a value of one, that the model code does not know."""
    usual = _LLAMA3 if kind == "llama3" else {"truncate": True}
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned", "factor", *usual}
    known |= {"attention_factor", *YARN_FIELDS} if kind == "yarn" else set()
    given = {name: value for name, value in scaling.items() if value is not None}
    odd = {name: value for name, value in given.items() if name not in known or value != usual.get(name, value)}
    odd |= {name: None for name in (_LLAMA3 if kind == "llama3" else ()) if name not in given}
    if odd:
        shown = " ".join(f"{name}={value}" for name, value in odd.items())
        raise CheckpointError(f"{where} scales rotary positions by {kind!r} with {shown}", _SUPPORTED)


def _yarn(scaling: Json, schema: Schema, where: Path | str) -> Json:
    values = {name: scaling.get(name) for name in ("factor", "original_max_position_embeddings")}
    values |= {"beta_fast": scaling.get("beta_fast") or 32.0, "beta_slow": scaling.get("beta_slow") or 1.0}
    mscale, all_dim = _temperatures(scaling, float(scaling["factor"]), schema.attention.latent, where)
    values |= {"mscale": mscale, "mscale_all_dim": all_dim}
    context = values["original_max_position_embeddings"]
    if context is None:
        raise CheckpointError(
            f"{where} scales rotary positions by 'yarn' and has no original_max_position_embeddings",
            "restore the released config.json",
        )
    return {field: values[name] for name, field in YARN_FIELDS.items()}


def _temperatures(scaling: Json, factor: float, latent: bool, where: Path | str) -> tuple[float, float]:
    """YaRN's mscale and mscale_all_dim.

    cos and sin are multiplied by g(mscale) / g(mscale_all_dim), where g(m) = 0.1 m ln(factor) + 1, and multi-latent
    attention multiplies its softmax scale by g(mscale_all_dim)^2. Where only one of the two is given, DeepSeek's code
    takes 1 and 0 for the other; transformers takes g(1) for the whole quotient. The models of most families only run
    in transformers, which decides there. For multi-latent attention such a config is refused unless both agree or
    `attention_factor`, which transformers multiplies cos and sin by, says the same as DeepSeek's code.
    """
    given, all_dim = scaling.get("mscale"), float(scaling.get("mscale_all_dim") or 0.0)
    mscale = 1.0 if given is None else float(given)
    attention = scaling.get("attention_factor")
    spelled_out = temperature(factor, mscale) / temperature(factor, all_dim)
    transformers = spelled_out if given and all_dim else temperature(factor, 1.0)
    if attention is not None:
        transformers = float(attention)
    if math.isclose(spelled_out, transformers, rel_tol=_TOLERANCE):
        return mscale, all_dim
    if not latent:
        return _mscale_of(transformers, factor, where), 0.0
    raise CheckpointError(
        f"{where} has mscale={given} mscale_all_dim={scaling.get('mscale_all_dim')} attention_factor={attention} for "
        f"yarn: DeepSeek's code multiplies cos and sin by {spelled_out:.6g}, and transformers by {transformers:.6g}",
        f"set both mscale and mscale_all_dim, or attention_factor={spelled_out!r}, to say what it was trained with",
    )


def _mscale_of(attention: float, factor: float, where: Path | str) -> float:
    """The mscale that makes `attention` of `temperature`."""
    if math.isclose(attention, temperature(factor, 1.0), rel_tol=_TOLERANCE):
        return 1.0
    if factor <= 1 or not 1 <= attention < math.inf:
        raise CheckpointError(
            f"{where} scales rotary positions by 'yarn' with attention_factor={attention}", _SUPPORTED
        )
    return (attention - 1.0) / (0.1 * math.log(factor))


def temperature(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write(model: ModelConfig) -> Json:
    """`rope_theta` and `rope_scaling` of config.json."""
    return {"rope_theta": model.rope_base, "rope_scaling": _written_scaling(model)}


def _written_scaling(model: ModelConfig) -> Json | None:
    if model.rope_type == "yarn":
        scaling: Json = {"type": "yarn", "rope_type": "yarn"}
        scaling |= {name: getattr(model, field) for name, field in YARN_FIELDS.items()}
        quotient = temperature(model.yarn_factor, model.yarn_mscale) / temperature(
            model.yarn_factor, model.yarn_mscale_all_dim
        )
        if not (model.yarn_mscale and model.yarn_mscale_all_dim) and quotient != temperature(model.yarn_factor, 1.0):
            scaling["attention_factor"] = quotient  # without both, transformers takes mscale for 1
        return scaling
    if model.rope_type == "llama3":
        return {"type": "llama3", "rope_type": "llama3", "factor": model.llama3_factor, **_LLAMA3}
    return None
