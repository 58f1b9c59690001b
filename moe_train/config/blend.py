"""Checks of `data.blend`. No torch import."""

from __future__ import annotations

import math
from dataclasses import replace

from moe_train.config.schema import BlendEntry
from parallel.suggest import override_value


def problem(entries: list[BlendEntry]) -> tuple[str, list[BlendEntry]] | None:
    """Why the entries are invalid, and entries that would work; None if they are valid."""
    for number, entry in enumerate(entries):
        weight = entry.weight
        if not entry.path.strip() or (weight is not None and not 0 < weight < math.inf):
            fixed = BlendEntry(entry.path.strip() or "PREFIX", None if weight is None else 1.0)
            return (
                f"data.blend has {override_value(entry)}, which is not a path with a weight above 0",
                [*entries[:number], fixed, *entries[number + 1 :]],
            )
    if len({entry.weight is None for entry in entries}) > 1:
        return (
            "data.blend has weights for some of its datasets only",
            [replace(entry, weight=None) for entry in entries],
        )
    paths = [entry.path for entry in entries]
    doubled = [path for number, path in enumerate(paths) if path in paths[:number]]
    if doubled:
        return (
            f"data.blend names {doubled[0]} more than once",
            [entry for number, entry in enumerate(entries) if entry.path not in paths[:number]],
        )
    return None
