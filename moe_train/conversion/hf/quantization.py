"""`quantization_config` of config.json <-> format of the weights. No torch import.

transformers and vLLM choose the loader by `quant_method`. `fp8` is read by finegrained_fp8. The other formats are those
of compressed-tensors, for which config.json has one group of linear layers and a list of those that stay in bf16. The
method `mxfp4` of transformers is for the fused experts of GPT-OSS only: MXFP4 is written with compressed-tensors too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.formats import block_fp8, mxfp4
from moe_train.formats.weight_formats import BlockFp8, Mxfp4, PackedInt, WeightFormat
from parallel.errors import CheckpointError

Json = dict[str, Any]
KEY = "quantization_config"
COMPRESSED_TENSORS = "compressed-tensors"
_PACK, _MXFP4 = "pack-quantized", "mxfp4-pack-quantized"
_SUPPORTED = "supported are symmetric int8 and int4 (pack-quantized), mxfp4-pack-quantized and block fp8"
_BLOCKS = f"FP8 here has one scale for each block of {block_fp8.BLOCK} x {block_fp8.BLOCK}"

# Arguments of a scheme that change what the numbers mean, and the values that they have in the formats here.
_NEUTRAL: Json = {"symmetric": True, "dynamic": False, "actorder": None, "block_structure": None}


def to_config(weights: WeightFormat, kept: Sequence[str]) -> Json:
    """What config.json says of weights in this format.

    Args:
        kept: linear layers in bf16, by the names of their modules. Loaders of FP8 know of the head by themselves.
    """
    if isinstance(weights, BlockFp8):
        config = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [block_fp8.BLOCK, block_fp8.BLOCK],
        }  # fmt: skip
        return config | ({"modules_to_not_convert": list(kept)} if kept else {})
    layout = _MXFP4 if isinstance(weights, Mxfp4) else _PACK
    group = {
        "targets": ["Linear"],
        "weights": _scheme(weights),
        "input_activations": None,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": COMPRESSED_TENSORS, "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(kept), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _scheme(weights: WeightFormat) -> Json:
    """Arguments of the weights in the schema of compressed-tensors (`QuantizationArgs`)."""
    if isinstance(weights, Mxfp4):
        numbers = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": mxfp4.GROUP}
        return numbers | {"symmetric": True, "dynamic": False, "scale_dtype": "torch.uint8"}
    assert isinstance(weights, PackedInt)
    strategy = "channel" if weights.group_size is None else "group"
    numbers = {"num_bits": weights.width, "type": "int", "strategy": strategy, "group_size": weights.group_size}
    return numbers | {"symmetric": True, "dynamic": False}


def of_config(config: Json, where: Path | str) -> WeightFormat | None:
    """The format that a config.json declares, None where it has none that packs numbers.

    Raises:
        CheckpointError: its weights are in a format that cannot be read here.
    """
    declared = config.get(KEY) or {}
    if not isinstance(declared, dict):
        raise CheckpointError(f"{where} has {KEY}={str(declared)[:100]}, which is not an object", _SUPPORTED)
    size = declared.get("weight_block_size")
    if size not in (None, [block_fp8.BLOCK, block_fp8.BLOCK]):
        raise CheckpointError(f"{where} has weight_block_size={size}", _BLOCKS)
    if declared.get("quant_method") != COMPRESSED_TENSORS:
        return BlockFp8() if declared.get("quant_method") == "fp8" else None
    groups = declared.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        count = len(groups) if isinstance(groups, dict) else "no"
        raise CheckpointError(f"{where} has {count} config_groups, and one is supported", _SUPPORTED)
    name, group = next(iter(groups.items()))
    scheme = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(scheme, dict):
        raise CheckpointError(f"{where} has no config_groups.{name}.weights", _SUPPORTED)
    layout = group.get("format") or declared.get("format")
    found = _of_scheme(scheme, layout)
    if found is None or group.get("input_activations") is not None:
        given = {key: scheme.get(key) for key in ("num_bits", "type", "strategy", "group_size", *_NEUTRAL)}
        shown = " ".join(f"{key}={value}" for key, value in given.items() if value is not None)
        inputs = "" if group.get("input_activations") is None else ", and quantised inputs"
        raise CheckpointError(f"{where} has weights of format {layout} with {shown}{inputs}"[:300], _SUPPORTED)
    return found


def _of_scheme(scheme: Json, layout: Any) -> WeightFormat | None:
    bits, kind, group_size = scheme.get("num_bits"), scheme.get("type", "int"), scheme.get("group_size")
    if any(scheme.get(key, value) not in (value, None) for key, value in _NEUTRAL.items()):
        return None
    if layout == _MXFP4 and (bits, kind, group_size) == (4, "float", mxfp4.GROUP):
        return Mxfp4()
    if layout != _PACK or kind != "int" or bits not in (4, 8):
        return None
    if scheme.get("strategy") == "channel" and group_size in (None, -1):
        return PackedInt(bits, None)
    if scheme.get("strategy", "group") == "group" and type(group_size) is int and group_size > 0:
        return PackedInt(bits, group_size)
    return None


def kept_of(config: Json) -> list[str]:
    """Modules that a config.json declares as not quantised."""
    declared = config.get(KEY) or {}
    kept = declared.get("ignore", declared.get("modules_to_not_convert")) or []
    return [name for name in kept if isinstance(name, str)] if isinstance(kept, list) else []
