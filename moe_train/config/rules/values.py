"""What holds of each field alone. No torch import."""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from moe_train.config.walk import FieldInfo, all_fields
from parallel.suggest import Impossible, fixes_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_values(cfg: DataclassInstance) -> None:
    """What can be said of each field of a config root alone. Raises Impossible with values that work."""
    for info, check, value_in in _checks(type(cfg)):
        check(info, value_in(cfg))


@cache
def _checks(root: type) -> list[tuple[FieldInfo, Callable[[FieldInfo, Any], None], Callable[[object], Any]]]:
    """For each field of a config root: its check and how to get its value. The remedies of a wrong config are found by
    thousands of checks of all fields."""
    return [
        (info, _check_entries if info.entry else check_value, operator.attrgetter(name))
        for name, info in all_fields(root).items()
    ]


def check_field(info: FieldInfo, value: Any) -> None:
    """What can be said of one field alone, and of each field of each entry of a list. Raises Impossible."""
    if info.entry:
        _check_entries(info, value)
    else:
        check_value(info, value)


def _check_entries(info: FieldInfo, entries: list[DataclassInstance]) -> None:
    """`check_value` of each field of each entry of a list."""
    for number, entry in enumerate(entries):
        for leaf, part in all_fields(type(entry)).items():
            named = dataclasses.replace(part, name=f"{info.name}[{number}].{leaf}")
            try:
                check_value(named, getattr(entry, leaf))
            except Impossible as problem:
                fixes = [
                    [*entries[:number], dataclasses.replace(entry, **{leaf: fix[named.name]}), *entries[number + 1 :]]
                    for fix in problem.fixes
                ]
                raise Impossible(problem.cause, fixes_of(info.name, fixes), problem.remedy) from None


def check_value(info: FieldInfo, value: Any) -> None:
    """What can be said of one value alone: not empty, finite, one of the choices, between smallest and largest.

    An empty path would be taken for none, and the run would train on other data, or for the working directory.
    """
    if value == "" and (info.name == "data.dir" or type(None) in typing.get_args(info.type)):
        raise Impossible(
            f"{info.name}='' is empty, as from a variable of the shell that is not set",
            otherwise=f"give it a value, or leave {info.name} out",
        )
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if info.choices and entry is not None and entry not in info.choices:
            names = ", ".join(info.choices)
            fitting: list[Any] = list(info.choices)
            if isinstance(value, list):  # as long as before: other lists have an entry for each of this one
                unused = iter(choice for choice in info.choices if choice not in value)
                fitting = [[e if e in info.choices else next(unused, info.choices[0]) for e in value]]
            raise Impossible(f"{info.name}={entry} is not one of {names}", fixes_of(info.name, fitting))
        if isinstance(entry, float) and not math.isfinite(entry):
            usual = fixes_of(info.name, [info.default])
            raise Impossible(f"{info.name}={entry} is not a finite number", usual)
        if info.minimum is not None and entry is not None and entry < info.minimum:
            smallest = info.minimum
            raise Impossible(
                f"{info.name}={entry} is below the smallest value {smallest:g}", fixes_of(info.name, [smallest])
            )
        if info.maximum is not None and entry is not None and entry > info.maximum:
            raise Impossible(
                f"{info.name}={entry} is above the largest value {info.maximum}",
                fixes_of(info.name, [info.maximum, info.default]),
            )
