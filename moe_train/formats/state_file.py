"""What `state.json` says of a run, checked before a rank uses it. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

TRAINED, UPDATES = "trained_samples", "optimizer_updates"
REACTIONS, SPIKE_WINDOW = "reactions", "spike_window"
_ADDED = (TRAINED, UPDATES)
"""Counts that earlier versions do not write. They follow `progress`, in which those versions refuse an unknown name."""
_PROGRESS = ("step", "consumed_samples", "consumed_tokens")
_SCALER = {"scale", "growth_tracker", "hysteresis_tracker"}
"""Of Megatron-Core's DynamicGradScaler."""
_LARGEST = 1 << 62


@dataclass(frozen=True)
class SavedProgress:
    """Training progress in a checkpoint, and how it was written."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    trained_samples: int | None
    """None where a version wrote it that had one length of sequences."""
    optimizer_updates: int
    """Updates of the weights, which Adam's bias correction counts: fewer than steps where fp16 or a bad step skipped
    some. The schedule's counter where an earlier version wrote it, which advanced the schedule once an update."""
    schedule_steps: int
    """Position of the learning-rate schedule."""
    reactions: dict[str, Any]
    """What the learning rate has reacted to (`moe_train/resilience/reactions.py`); empty in earlier versions."""
    spike_window: dict[str, Any]
    """Losses and gradient norms of good steps (`moe_train/resilience/bad_steps.py`); empty in earlier versions."""
    loss_scale: dict[str, dict[str, float]]
    layout: dict[str, int]
    device: str


def counts_of_run(counts: Mapping[str, int]) -> dict[str, Any]:
    """The entries of `state.json` for the counts of a `TrainState`, by their names."""
    added = {name: counts[name] for name in _ADDED}
    return {**added, "progress": {name: count for name, count in counts.items() if name not in _ADDED}}


def parse(state: Mapping[str, Any]) -> SavedProgress:
    """The facts in the object of a `state.json`.

    Raises:
        ValueError: one is missing, or has a value that no run writes.
    """
    progress, layout, scales = (_mapping(state, name) for name in ("progress", "layout", "loss_scale"))
    if unknown := progress.keys() - {*_PROGRESS}:
        raise ValueError(f"progress has {min(map(str, unknown))}")
    counts = {name: _count(progress, name) for name in _PROGRESS}
    schedule_steps = _count(_mapping(state, "schedule"), "num_steps")
    if not isinstance(state.get("device"), str):
        raise ValueError("it has no device")
    return SavedProgress(
        **counts,
        trained_samples=_count(state, TRAINED) if TRAINED in state else None,
        optimizer_updates=_count(state, UPDATES) if UPDATES in state else schedule_steps,
        schedule_steps=schedule_steps,
        reactions=dict(_mapping(state, REACTIONS)) if REACTIONS in state else {},
        spike_window=dict(_mapping(state, SPIKE_WINDOW)) if SPIKE_WINDOW in state else {},
        loss_scale={kind: _scaler(_mapping(scales, kind)) for kind in scales},
        layout={name: _count(layout, name) for name in layout},
        device=state["device"],
    )


def position(state: Mapping[str, Any]) -> tuple[int, int, int]:
    """Steps, tokens and position of the schedule in the object of a `state.json`. Raises as `parse`."""
    progress, schedule = _mapping(state, "progress"), _mapping(state, "schedule")
    return _count(progress, "step"), _count(progress, "consumed_tokens"), _count(schedule, "num_steps")


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"it has no {name}")
    return value


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{name}={value!r:.100} is not a count")
    return value


def _scaler(values: Mapping[str, Any]) -> dict[str, float]:
    """The state of a loss scale; empty where it is constant."""
    if values and values.keys() != _SCALER:
        raise ValueError("loss_scale is not that of an optimizer")
    for name, value in values.items():
        # Upstream counts on below zero in hysteresis_tracker.
        if type(value) not in (int, float) or not isfinite(value) or (name == "scale" and value <= 0):
            raise ValueError(f"loss_scale has {name}={value!r:.100}")
    return dict(values)
