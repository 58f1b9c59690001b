"""PrecisionConfig -> options of Megatron-Core, Transformer Engine and the emulation on CPUs; the cast of a model.

The emulation itself: fp8.py (numbers), linear.py (the three GEMMs of a linear layer), delayed_scaling.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from moe_train.config.rules.precision import power_of_two_scales
from moe_train.config.schema import PrecisionConfig
from moe_train.model.fp8.linear import Recipe
from parallel.fp8_recipes import RECIPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_options(precision: PrecisionConfig) -> dict[str, Any]:
    """What Megatron-Core's TransformerConfig has to know of the format outside of FP8 and FP4."""
    dtype = DTYPES[precision.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }


def low_precision_options(precision: PrecisionConfig) -> dict[str, Any]:
    """Options of Transformer Engine's FP8 and FP4. The `local` backend emulates FP8 without Megatron-Core knowing: with
    `fp8` set, upstream recomputes through Transformer Engine (transformer/transformer_block.py).

    Whether scales are powers of two is up to environment variables (backend.py).
    """
    if precision.fp8 is None and precision.fp4 is None:
        return {}
    layers = {
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }
    if precision.fp8 is None:
        return {"fp4": "e2m1", "fp4_recipe": RECIPES[precision.fp4 or ""].megatron, **layers}
    recipe = RECIPES[precision.fp8]
    delayed = {"fp8_amax_history_len": precision.amax_history_len, "fp8_amax_compute_algo": "max"}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": recipe.megatron,
        "fp8_param": precision.fp8_param_gather,
        **layers,
        **(delayed if recipe.delayed else {}),
    }


def emulated_recipe(precision: PrecisionConfig) -> Recipe | None:
    """What the linear layers of the `local` backend emulate; None without FP8."""
    if precision.fp8 is None:
        return None
    return Recipe(
        precision.fp8, hybrid=precision.fp8_format == "hybrid", power_of_two=power_of_two_scales(precision),
        history=precision.amax_history_len, dispatch=precision.fp8_dispatch,
    )  # fmt: skip


def in_training_precision(chunk: nn.Module, config: TransformerConfig) -> nn.Module:
    """`chunk` with parameters and activations in the 16-bit dtype of `config`; unchanged in fp32.

    Buffers keep their dtype. Upstream's `Float16Module` casts them too, and routers count in them: bf16 cannot count
    beyond 256, nor tell 2,001 tokens from 2,000.
    """
    if not (config.bf16 or config.fp16):
        return chunk
    buffers = [
        (module, name, buffer) for module in chunk.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    cast = Float16Module(config, chunk)
    for module, name, buffer in buffers:
        setattr(module, name, buffer)
    return cast
