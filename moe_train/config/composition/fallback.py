"""Layouts for a job that comes back with fewer or more ranks: the same batch and data, spread otherwise. No torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moe_train.config.composition.validate import validate
from moe_train.config.launcher import FallbackLayout
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, typed, violation, with_values
from parallel.errors import ConfigError
from parallel.suggest import override_value

# What may differ between layouts of one run. The global batch and the order of data stay, so the run stays the same.
_FREE = ("parallel.", "recompute.", "batch.micro_batch_size")


def fitting(cfg: Config, world_size: int) -> Config:
    """`cfg`, or `cfg` with the first of `launcher.fallbacks` that fits `world_size` ranks.

    Raises:
        ConfigError: neither fits; it tells why `cfg` itself does not.
    """
    tried = [one for _, one in candidates(cfg)]
    first: ConfigError | None = None
    for candidate in tried:
        try:
            validate(candidate, world_size)
        except ConfigError as error:
            first = first or error
        else:
            return candidate
    assert first is not None
    if len(tried) == 1:
        raise first
    cause = f"{first.cause}; nor does any of the {len(tried) - 1} launcher.fallbacks fit {world_size} ranks"
    raise ConfigError(cause, first.remedy)


def candidates(cfg: Config) -> list[tuple[str, Config]]:
    """("", `cfg`) and each entry of `launcher.fallbacks`, as text, with `cfg` changed by it, in the order of trying
    them.

    Raises:
        ConfigError: an entry changes more than the layout, or has a value that its field cannot have.
    """
    entries = cfg.launcher.fallbacks
    return [("", cfg), *((override_value(entry), with_values(cfg, values_of(entry))) for entry in entries)]


def values_of(entry: FallbackLayout) -> dict[str, Any]:
    """Fields by full name of one entry of `launcher.fallbacks`.

    Raises:
        ConfigError: it changes more than the layout, or has a value that its field cannot have.
    """
    values: dict[str, Any] = {}
    for group in fields(entry):
        for leaf, value in getattr(entry, group.name).items():
            name = f"{group.name}.{leaf}"
            if not name.startswith(_FREE) or name not in all_fields():
                raise ConfigError(
                    f"launcher.fallbacks changes {name}, which is not a field of the layout",
                    "change fields of parallel and recompute, and batch.micro_batch_size",
                )
            if reason := violation(name, value):
                shown = f"{name}={override_value(value)}"
                raise ConfigError(f"launcher.fallbacks has {shown}, which is {reason}", f"correct {name}")
            values[name] = typed(name, value)
    return values
