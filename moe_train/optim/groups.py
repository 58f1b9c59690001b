"""`optimizer.groups` as Megatron-Core takes it: overrides of parameter groups (its optimizer/__init__.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import nn

from moe_train.config.parameter_groups import group_of
from moe_train.config.schema import Config
from moe_train.optim.names import global_names

Overrides = dict[ParamKey, dict[str, Any]]


def overrides(cfg: Config, options: OptimizerConfig, chunks: Sequence[nn.Module]) -> Overrides:
    """Learning rate and weight decay of each entry's parameters, and upstream's exemptions for the others.

    Upstream merges all overrides that match a parameter, and refuses two that disagree. So a parameter has one of each
    kind: the first entry that matches decides.
    """
    groups = cfg.optimizer.groups
    names = global_names(chunks) if groups else {}
    entries = {parameter: group_of(name, groups) for parameter, name in names.items()}
    result: Overrides = {}
    for index, group in enumerate(groups):
        own: dict[str, Any] = {}
        if group.lr_multiplier != 1:
            own |= {"max_lr": options.lr * group.lr_multiplier, "min_lr": options.min_lr * group.lr_multiplier}
        if group.weight_decay is not None:
            own["wd_mult"] = group.weight_decay / options.weight_decay if group.weight_decay else 0.0
        if own:
            result[_key(f"groups[{index}]", entries, index)] = own
    decided = {entry for entry, group in enumerate(groups) if group.weight_decay is not None}
    for key, override in get_standard_config_overrides(options).items():
        result[_undecided(key, entries, decided)] = override
    return result


def _key(name: str, entries: dict[nn.Parameter, int | None], index: int) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name, lambda param, _: entries.get(param) == index))


def _undecided(key: ParamKey, entries: dict[nn.Parameter, int | None], decided: set[int]) -> ParamKey:
    """`key`, for parameters whose weight decay no entry says."""

    def fits(param: nn.Parameter, name: str) -> bool:
        return entries.get(param) not in decided and key.matches(param, name)

    return ParamKey(with_name_predicate=ParamWithNamePredicate(f"standard {key.name}", fits))
