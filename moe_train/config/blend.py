"""Entries of `data.blend`. No torch import."""

from __future__ import annotations

import math


def parse(entry: str) -> tuple[float | None, str]:
    """(weight, prefix) of 'WEIGHT PREFIX', or (None, prefix) of 'PREFIX'. A prefix may have spaces."""
    first, _, rest = entry.strip().partition(" ")
    try:
        weight = float(first)
    except ValueError:
        return None, entry.strip()
    return weight, rest.strip()


def problem(entries: list[str]) -> tuple[str, list[str]] | None:
    """What is wrong with the entries, and entries that would work; None where nothing is."""
    parsed = [parse(entry) for entry in entries]
    for number, (entry, (weight, prefix)) in enumerate(zip(entries, parsed, strict=True)):
        if not prefix or (weight is not None and not 0 < weight < math.inf):
            fixed = f"1.0 {prefix or 'PREFIX'}"
            return (
                f"data.blend has {entry!r}, which is not 'WEIGHT PREFIX' with a weight above 0",
                [*entries[:number], fixed, *entries[number + 1 :]],
            )
    if len({weight is None for weight, _ in parsed}) > 1:
        return (
            "data.blend has weights for some of its datasets only",
            [prefix for _, prefix in parsed],
        )
    doubled = [prefix for number, (_, prefix) in enumerate(parsed) if prefix in [p for _, p in parsed[:number]]]
    if doubled:
        return (
            f"data.blend names {doubled[0]} more than once",
            [entry for number, entry in enumerate(entries) if parsed[number][1] not in [p for _, p in parsed[:number]]],
        )
    return None
