"""Remedies for a layout that does not fill `launcher.nodes`. No torch import."""

from __future__ import annotations

from dataclasses import replace

from launch import checks
from launch.estimate import check_memory, estimate
from moe_train.config.schema import Config
from moe_train.config.validate import validate
from moe_train.config.walk import with_values
from parallel.errors import ConfigError
from parallel.suggest import Fix, Impossible


def refused(cfg: Config, error: ConfigError) -> ConfigError:
    """`error`, raised for `cfg` on its nodes, with remedies that pass every rule and whose ranks fit their GPUs.

    First the number of nodes that the layout fills, then other layouts for the number that was asked for.
    """
    own = replace(cfg, launcher=replace(cfg.launcher, nodes=None))
    fixes: list[Fix] = []
    try:
        layout = validate(own)
        check_memory(estimate(own, layout), layout)
        fixes.append({"launcher.nodes": checks.nodes_of(own, layout)})
    except ConfigError:
        pass  # the layout has a problem of its own
    for fix in error.fixes if isinstance(error, Impossible) else []:
        if _fits(with_values(cfg, fix)):
            fixes.append(fix)
    return Impossible(error.cause, fixes) if fixes else error


def _fits(cfg: Config) -> bool:
    nodes = cfg.launcher.nodes or 1
    try:
        layout = validate(cfg, nodes * cfg.launcher.ranks_per_node)
        check_memory(estimate(cfg, layout), layout)
    except ConfigError:
        return False
    return True
