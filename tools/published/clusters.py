"""Clusters of `conf/cluster/` by name. No torch import."""

from __future__ import annotations

from functools import cache

import yaml

from moe_train.config.cluster import ClusterConfig
from moe_train.config.composition.explain import CONF_DIR
from parallel.planner.hardware import Hardware


def names() -> list[str]:
    """All of them."""
    return sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml"))


@cache
def cluster_config(name: str) -> ClusterConfig:
    """The cluster in `conf/cluster/NAME.yaml`."""
    return ClusterConfig(**yaml.safe_load((CONF_DIR / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")))


def hardware_of(name: str) -> Hardware:
    """The same as the planner sees it."""
    return Hardware.of(cluster_config(name))
