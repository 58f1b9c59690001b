"""What each pipeline chunk recomputes. No torch import."""

from __future__ import annotations

from dataclasses import replace

from moe_train.config.schema import RecomputeConfig


def of_chunk(recompute: RecomputeConfig, chunk: int) -> RecomputeConfig:
    """The settings of chunk `chunk` of the pp x vpp, in the order that tokens pass them; all alike without `stages`."""
    if not recompute.stages:
        return recompute
    entry = recompute.stages[chunk % len(recompute.stages)]
    return replace(recompute, mode=entry.resolved_mode, modules=list(entry.modules), stages=[])


def settings(recompute: RecomputeConfig) -> list[RecomputeConfig]:
    """Those of all chunks, each kind once."""
    chunks = [of_chunk(recompute, chunk) for chunk in range(max(1, len(recompute.stages)))]
    return [one for number, one in enumerate(chunks) if one not in chunks[:number]]
