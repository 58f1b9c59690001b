"""Tiny models whose layers have whole groups of 128 inputs, and their quantised exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conversion import models
from tests.conversion.convert import convert

_WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_EXPERTS = {"moe_intermediate_size": 128}
# Changes of tests/conversion/models.py.
WIDE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_WIDE, **_EXPERTS, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32},
    "deepseek_v2_lite": {**_WIDE, **_EXPERTS, "kv_lora_rank": 128, "v_head_dim": 32},
    "glm4_moe_lite": {
        **_WIDE, **_EXPERTS, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "qwen3_moe": {**_WIDE, **_EXPERTS, "head_dim": 32},
    "qwen2_moe": {**_WIDE, **_EXPERTS, "shared_expert_intermediate_size": 128},
    "glm4_moe": {**_WIDE, **_EXPERTS, "head_dim": 32},
    "mixtral": _WIDE,
    "olmoe": _WIDE,
    "minimax_m2": {**_WIDE, "head_dim": 32},
    "llama": _WIDE,
}  # fmt: skip
# Name of the test -> options of the conversion.
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int8, groups of 64": {"dtype": "int8", "group_size": 64},
    "int4": {"dtype": "int4"},
    "mxfp4": {"dtype": "mxfp4"},
    "fp8": {"dtype": "fp8"},
}
# Layers of deepseek_v3 with a smaller last block of FP8, which transformers reads with blocks of another size, and one
# that vLLM joins with them.
RAGGED = ["lm_head", *(f"*.self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj"))]


def save(name: str, directory: Path) -> Path:
    """The wide model of that name in bf16, with rows and columns of many sizes; returns the directory."""
    model = models.build(name, **WIDE[name]).bfloat16()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.dim() > 1 and "embed" not in key:
                for axis in (-1, -2):
                    exponents = torch.randint(-1, 2, (tensor.shape[axis],), generator=generator)
                    exponents[tensor.shape[axis] // 2 :] -= 1
                    sizes = (2.0**exponents).bfloat16()
                    tensor.mul_(sizes if axis == -1 else sizes.unsqueeze(-1))
    models.write(model, name, directory)
    return directory


def export(source: Path, target: Path, form: str, **options: Any) -> Path:
    """Export the source in a format of FORMATS, with more options; returns the target."""
    convert(source, target, to="hf", **FORMATS[form], **options)
    return target


def tokens() -> torch.Tensor:
    """Token ids [2, 24]."""
    return torch.randint(0, models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
