"""Registers the typed schema with Hydra, so that YAML files and overrides are checked against it."""

from __future__ import annotations

import typing

from hydra.core.config_store import ConfigStore

from moe_train.config.schema import Config
from moe_train.config.walk import group_names


def register() -> None:
    """Store `Config` as `schema`, and each group's dataclass as `GROUP/schema`, which user YAML can extend.

    A file of one's own for a group begins with `defaults: [schema, _self_]` to be checked on its own, or stands in a
    group that `train.yaml` composes, where the root schema checks it anyway.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config, provider="moe_train")
    types = typing.get_type_hints(Config)
    for group in group_names():
        store.store(group=group, name="schema", node=types[group], provider="moe_train")
