"""Tokens of experts, by MoE layer. No torch import."""

from __future__ import annotations

from moe_train.config.model import ModelConfig


def by_moe_layer(model: ModelConfig, load: list[list[int]]) -> dict[int, list[int]]:
    """Tokens of each expert by the number of the layer, from 1; multi-token-prediction layers follow the others.

    Args:
        load: a row for every layer, also for dense ones.
    """
    pattern = model.moe_layer_pattern
    pattern = pattern + pattern[-1:] * model.mtp_num_layers
    return {i: row for i, (row, moe) in enumerate(zip(load, pattern, strict=True), 1) if moe}


def imbalance(load: dict[int, list[int]]) -> dict[str, float]:
    """Metrics `expert_load_imbalance/layer_N`: tokens of the most loaded expert, relative to the mean."""
    return {f"expert_load_imbalance/layer_{i}": max(row) * len(row) / max(1, sum(row)) for i, row in load.items()}
