"""Layouts for a job that comes back with fewer or more ranks: the same batch and data, spread otherwise. No torch."""

from __future__ import annotations

from typing import Any

from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, violation, with_values
from moe_train.files import untrusted
from parallel.errors import ConfigError

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
    """("", `cfg`) and each entry of `launcher.fallbacks` with `cfg` changed by it, in the order of trying them.

    Raises:
        ConfigError: an entry is no list of overrides, or changes more than the layout.
    """
    return [("", cfg), *((text, with_values(cfg, values_of(text))) for text in cfg.launcher.fallbacks)]


def values_of(text: str) -> dict[str, Any]:
    """Fields by full name of one entry of `launcher.fallbacks`, such as 'parallel.dp=2 parallel.ep=2'.

    Raises:
        ConfigError: it is no list of overrides, or changes more than the layout.
    """
    values: dict[str, Any] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"launcher.fallbacks has {word!r}, which is not KEY=VALUE", "write 'parallel.dp=2'")
        if not name.startswith(_FREE) or name not in all_fields():
            raise ConfigError(
                f"launcher.fallbacks changes {name}, which is not a field of the layout",
                "change fields of parallel and recompute, and batch.micro_batch_size",
            )
        try:
            values[name] = untrusted.parse_yaml(value)
        except ValueError:
            raise ConfigError(
                f"launcher.fallbacks has {word!r}, whose value cannot be read", f"correct {name}"
            ) from None
        if reason := violation(name, values[name]):
            raise ConfigError(f"launcher.fallbacks has {word}, which is {reason}", f"correct {name}")
    return values
