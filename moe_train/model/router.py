"""Routers that differ from Megatron-Core's."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe_train.config.model import ModelConfig
from parallel.runtime.expert_groups import groups_scored_by_their_best_expert


class BestExpertOfGroupRouter(TopKRouter):
    """Upstream's, but a group of experts is ranked by its best expert: `router_group_score=max`."""

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s, b, experts] -> weights and choice, each [s * b, experts]."""
        with groups_scored_by_their_best_expert():
            return super().routing(logits, *args, **kwargs)


def scores_groups_by_best(model: ModelConfig) -> bool:
    """Whether the routers of `model` rank groups of experts, and do so by their best expert."""
    return model.is_moe and model.router_num_groups > 0 and model.router_group_score == "max"


def set_router(mlp: Any, router: type[TopKRouter]) -> None:
    """Let the MoE layer of spec `mlp` use `router`; a dense feed-forward has none to set.

    The spec is a `ModuleSpec`, from Megatron-Core 0.19 on a partial call of the layer.
    """
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    if isinstance(submodules, MoESubmodules):
        submodules.router = router
