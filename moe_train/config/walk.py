"""The fields of the config by their full names, such as `model.num_layers`. No torch import."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

from moe_train.config.schema import Config

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

AnyConfig = TypeVar("AnyConfig", bound="DataclassInstance")
"""A config dataclass: `Config`, or another root (`moe_train.config.roots`)."""


@dataclass(frozen=True)
class FieldInfo:
    """One leaf of the config: full name, type, default, one-line doc, allowed strings, smallest and largest value."""

    name: str
    type: Any
    default: Any
    doc: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: int | None
    example: str = ""

    @property
    def entry(self) -> type | None:
        """The dataclass of the entries of a list; None for every other field. `all_fields` lists its fields."""
        arguments = typing.get_args(self.type) if typing.get_origin(self.type) is list else ()
        return arguments[0] if arguments and dataclasses.is_dataclass(arguments[0]) else None


@cache
def all_fields(root: type = Config) -> Mapping[str, FieldInfo]:
    """Every leaf of a config root by its full name, in the order of the schema."""
    fields_by_name: dict[str, FieldInfo] = {}

    def visit(config_class: type, prefix: str) -> None:
        types = typing.get_type_hints(config_class)
        for item in dataclasses.fields(config_class):
            name, kind = prefix + item.name, types[item.name]
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                visit(kind, name + ".")
            else:
                meta = item.metadata
                fields_by_name[name] = FieldInfo(
                    name, kind, _default(item), meta.get("doc", ""), meta.get("choices", ()), meta.get("minimum"),
                    meta.get("maximum"), meta.get("example", ""),
                )  # fmt: skip

    visit(root, "")
    return fields_by_name


def _default(item: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field; MISSING for one that an entry of a list must have."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


@cache
def group_names(root: type = Config) -> tuple[str, ...]:
    """The groups of a config root: `model`, `parallel`, ..."""
    return tuple(f.name for f in dataclasses.fields(root) if f.name not in all_fields(root))


def violation(name: str, value: Any) -> str:
    """Why the field `name` cannot have this value, which did not come through Hydra; "" where it can."""
    return _violation(all_fields()[name], value)


def _violation(info: FieldInfo, value: Any) -> str:
    if info.entry:
        return _violation_of_entries(info.entry, value)
    if typing.get_origin(info.type) is list:
        return _violation_of_list(typing.get_args(info.type)[0], value)
    if typing.get_origin(info.type) is dict:
        return "" if isinstance(value, dict) else "not a mapping"
    kinds = typing.get_args(info.type) or (info.type,)
    if value is None and type(None) in kinds:
        return ""
    if bool in kinds or isinstance(value, bool):
        return (
            "" if bool in kinds and isinstance(value, bool) else f"not {_KINDS.get(kinds[0], 'a value of this field')}"
        )
    if (int in kinds or float in kinds) and not isinstance(value, int if float not in kinds else (int, float)):
        return f"not {_KINDS[kinds[0]]}"
    if str in kinds and not isinstance(value, str):
        return "not text"
    if str in kinds:
        return "" if not info.choices or value in info.choices else f"not one of {', '.join(info.choices)}"
    if not isfinite(value):
        return "not finite"
    if info.minimum is not None and value < info.minimum:
        return f"below {info.minimum:g}"
    return f"above {info.maximum}" if info.maximum is not None and value > info.maximum else ""


def _violation_of_list(kind: Any, value: Any) -> str:
    """Why a field that is a list of `kind` cannot have this value; "" where it can."""
    if not isinstance(value, list):
        return "not a list"
    kinds = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(kind)
    wrong = [item for item in value if kinds and type(item) not in kinds]
    return f"a list with {wrong[0]!r:.100}, which is not {_KINDS[kind]}" if wrong else ""


def _violation_of_entries(entry: type, value: Any) -> str:
    """Why a list of entries cannot have this value, in which each is a mapping; "" where it can."""
    if not isinstance(value, list):
        return "not a list"
    fields = all_fields(entry)
    for item in value:
        if not isinstance(item, dict):
            return f"a list with {item!r:.100}, which is not a mapping"
        for name in item:
            if name not in fields:
                return f"a list with an entry that has {name!r:.100}, which is not one of {', '.join(fields)}"
            if why := _violation(fields[name], item[name]):
                return f"a list with an entry that has {name}={item[name]!r:.100}, which is {why}"
        for name, info in fields.items():
            if info.default is dataclasses.MISSING and name not in item:
                return f"a list with an entry without {name}"
    return ""


def typed(name: str, value: Any) -> Any:
    """The value of a field as the config has it, from what YAML has: entries of lists become dataclasses.

    Args:
        value: one without `violation`.
    """
    entry = all_fields()[name].entry
    return value if entry is None else [item if isinstance(item, entry) else entry(**item) for item in value]


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def plain(kind: Any) -> Any:
    """`int` of `int | None`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def get(cfg: object, name: str) -> Any:
    """Value of the field with this full name."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return value


def with_values(cfg: AnyConfig, values: Mapping[str, Any]) -> AnyConfig:
    """A copy of `cfg` with these fields (by full name) changed."""
    for name, value in values.items():
        group, _, leaf = name.rpartition(".")
        if group:
            cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **{leaf: value})})
        else:
            cfg = dataclasses.replace(cfg, **{leaf: value})
    return cfg
