"""Entries of `launcher.fallbacks`: each changes fields of the layout, to values that these fields can have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from moe_train.config.aliases import FIELDS
from moe_train.config.launcher import FallbackLayout
from moe_train.config.resolve import ResolvedConfig, Rule
from moe_train.config.rules.values import check_field
from moe_train.config.schema import Config
from moe_train.config.walk import FieldInfo, all_fields, get, typed, violation
from parallel.suggest import Fix, Impossible, fixes_of, override_value

FIELD = "launcher.fallbacks"
# What may differ between layouts of one run. The global batch and the order of data stay, so the run stays the same.
_FREE = ("parallel.", "recompute.", "batch.micro_batch_size")


def fallbacks(facts: ResolvedConfig) -> None:
    """Fields and values of all entries. Whether a layout fits is known with the number of ranks."""
    for number in range(len(facts.cfg.launcher.fallbacks)):
        values_of(facts.cfg, number)


def values_of(cfg: Config, number: int) -> dict[str, Any]:
    """Fields by full name that entry `number` of `launcher.fallbacks` changes.

    Raises:
        Impossible: it changes more than the layout, or has a value that its field cannot have.
    """
    entry = cfg.launcher.fallbacks[number]
    return {
        f"{group.name}.{leaf}": _value(cfg, number, f"{group.name}.{leaf}", value)
        for group in dataclasses.fields(entry)
        for leaf, value in getattr(entry, group.name).items()
    }


def _value(cfg: Config, number: int, name: str, value: Any) -> Any:
    """The value of the field `name` as the config has it. Raises Impossible."""
    entries, subject = cfg.launcher.fallbacks, f"{FIELD}[{number}]"
    info = all_fields().get(name)
    if info is None or not name.startswith(_FREE):
        raise Impossible(
            f"{subject} changes {name}, which is not a field of the layout",
            fixes_of(FIELD, [_changed(entries, number, name, near, value) for near in _similar(name)]),
            "change fields of parallel and recompute, and batch.micro_batch_size",
        )
    if reason := violation(name, value):
        fitting = [_changed(entries, number, name, name, usual) for usual in _usual(cfg, info, value)]
        shown = f"{name}={override_value(value)}"
        raise Impossible(f"{subject} has {shown}, which is {reason}", fixes_of(FIELD, fitting))
    result = typed(name, value)
    named = dataclasses.replace(info, name=f"{subject}.{name}")
    try:
        check_field(named, result)
    except Impossible as problem:
        values = [fix[named.name] for fix in problem.fixes]
        fixes: list[Fix] = fixes_of(FIELD, [_changed(entries, number, name, name, other) for other in values])
        raise Impossible(problem.cause, fixes, problem.remedy) from None
    return result


def _similar(name: str) -> list[str]:
    """Up to two fields of the layout like `name`, which no field has; none for a field of the config itself."""
    if name in all_fields():
        return []
    group, _, leaf = name.partition(".")
    free = [full for full in all_fields() if full.startswith(_FREE)]
    leaves = [full.removeprefix(f"{group}.") for full in free if full.startswith(f"{group}.")]
    near = [f"{group}.{close}" for close in difflib.get_close_matches(leaf, leaves, n=2)]
    elsewhere = [full for full in free if full.endswith(f".{leaf}")]
    alias = FIELDS.get(leaf.lower())
    return list(dict.fromkeys([*([alias] if alias in free else []), *elsewhere, *near]))[:2]


def _usual(cfg: Config, info: FieldInfo, value: Any) -> list[Any]:
    """Values that work in place of one that its field cannot have: the nearest, then that of the run's own layout."""
    own = get(cfg, info.name)
    if isinstance(value, (int, float)) and info.minimum is not None and value < info.minimum:
        return [info.minimum, own]
    if isinstance(value, (int, float)) and info.maximum is not None and value > info.maximum:
        return [info.maximum, own]
    return [own]


def _changed(
    entries: Sequence[FallbackLayout], number: int, name: str, new_name: str, value: Any
) -> list[FallbackLayout]:
    """The entries with the field `name` of one of them replaced by `new_name`."""
    groups = {group.name: dict(getattr(entries[number], group.name)) for group in dataclasses.fields(entries[number])}
    group, _, leaf = name.partition(".")
    del groups[group][leaf]
    group, _, leaf = new_name.partition(".")
    groups[group][leaf] = value
    return [*entries[:number], FallbackLayout(**groups), *entries[number + 1 :]]


RULES: tuple[Rule, ...] = (fallbacks,)
