"""Remedies for a layout that does not fill `launcher.nodes`. No torch import."""

from __future__ import annotations

from dataclasses import replace

from launch.slurm import checks
from launch.slurm.estimate import check_memory, run_estimate
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.config.walk import with_values
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.suggest import Fix, Impossible


def refused(cfg: Config, error: ConfigError) -> ConfigError:
    """`error`, raised for `cfg` on its nodes, with remedies that pass every rule and whose ranks fit their GPUs.

    First the number of nodes that the layout fills, then other layouts for the number that was asked for.
    """
    without_nodes = replace(cfg, launcher=replace(cfg.launcher, nodes=None))
    fixes: list[Fix] = []
    layout = _fitting(without_nodes)
    if layout is not None and layout.world_size % without_nodes.launcher.ranks_per_node == 0:
        fixes.append({"launcher.nodes": checks.nodes_of(without_nodes, layout)})
    for fix in error.fixes if isinstance(error, Impossible) else []:
        other = with_values(cfg, fix)
        if _fitting(other, (other.launcher.nodes or 1) * other.launcher.ranks_per_node) is not None:
            fixes.append(fix)
    return Impossible(error.cause, fixes) if fixes else error


def _fitting(cfg: Config, world_size: int | None = None) -> ParallelLayout | None:
    """The layout of a config that passes every rule, memory included; None where one refuses it."""
    try:
        layout = validate(cfg, world_size)
        check_memory(run_estimate(cfg, layout), layout)
    except ConfigError:
        return None
    return layout
