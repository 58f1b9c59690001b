"""Registers the typed schema with Hydra, so that YAML files and overrides are checked against it."""

from __future__ import annotations

import typing
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from moe_train.config.resolve import decay_end, total_steps
from moe_train.config.roots import ROOTS
from moe_train.config.walk import group_names
from parallel.suggest import Impossible


def default_warmup(usual: int, shortest: int | None = None, *, _root_: Any) -> int:
    """Warm-up of a run whose config does not say it: `usual` steps, or a tenth where the decay ends before `shortest`.

    conf/schedule/ calls it as ${default_warmup:20}. `_root_` is the config that is being composed, where values are
    not checked yet.

    Args:
        shortest: steps; None means `usual`.
    """
    tokens_per_step = _root_.batch.global_batch_size * _root_.train.seq_length
    if _root_.train.tokens is not None and tokens_per_step <= 0:
        return usual
    try:
        end = max(0, decay_end(_root_.schedule, total_steps(_root_)))
    except Impossible:  # which a rule tells
        return usual
    return usual if end >= (usual if shortest is None else shortest) else end // 10


_registered: set[type] = set()


def register(*roots: type) -> None:
    """Store the dataclass of each of these roots, `Config` as `schema`, and of its groups as `GROUP/schema`, which user
    YAML can extend. Without roots all are stored, which takes 10 ms for each.

    A file of one's own for a group begins with `defaults: [schema, _self_]` to be checked on its own, or is in a group
    that `run.yaml` composes, where the root schema checks it anyway.
    """
    OmegaConf.register_new_resolver("default_warmup", default_warmup, replace=True)
    store = ConfigStore.instance()
    for root in roots or ROOTS:
        if root in _registered:
            continue
        _registered.add(root)
        store.store(name=ROOTS[root].schema, node=root, provider="moe_train")
        types = typing.get_type_hints(root)
        for group in group_names(root):
            store.store(group=group, name="schema", node=types[group], provider="moe_train")
