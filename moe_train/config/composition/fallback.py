"""Layouts for a job that comes back with fewer or more ranks: the same batch and data, spread otherwise. No torch."""

from __future__ import annotations

from moe_train.config.composition.validate import validate
from moe_train.config.rules.fallbacks import values_of
from moe_train.config.schema import Config
from moe_train.config.walk import with_values
from parallel.errors import ConfigError
from parallel.suggest import override_value


def fitting(cfg: Config, world_size: int) -> Config:
    """`cfg`, or `cfg` with the first of `launcher.fallbacks` that fits `world_size` ranks.

    Raises:
        ConfigError: neither fits; it tells why `cfg` itself does not.
    """
    tried = [candidate for _, candidate in candidates(cfg)]
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
    changed = [with_values(cfg, values_of(cfg, number)) for number in range(len(entries))]
    return [("", cfg), *zip(map(override_value, entries), changed, strict=True)]
