"""Routers that differ from Megatron-Core's."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe_train.config.model import ModelConfig
from parallel.runtime.expert_groups import groups_scored_by_their_best_expert


class Router(TopKRouter):
    """Upstream's, with balance losses whose weight depends on neither micro-batch size nor data parallelism."""

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, coeff: float, loss: Tensor, name: str, reduce_group: Any, **options: Any
    ) -> Tensor:
        """Have the gradient of `activation` [tokens of this rank, experts] include that of a balance loss.

        `loss` is this rank's share of a mean over the tokens of `reduce_group`. Gradients of a step are divided by all
        its tokens in the end, so the share is multiplied by this rank's tokens and, in upstream from 0.19 on or in
        `build.py` before, by tp x cp. Upstream gets two of the factors wrong:

        - 0.16 takes the tokens of one sequence for `seq_aux_loss`, which then weighs 1 / micro_batch_size.
        - `global_aux_loss` is shared by data-parallel ranks too, and weighs 1 / dp.
        """
        data_parallel_shares = reduce_group.size() // self.tp_cp_group.size()
        options["valid_token_count"] = activation.shape[0] * data_parallel_shares
        attached: Tensor = super().attach_and_log_load_balancing_loss(
            activation, coeff, loss, name, reduce_group, **options
        )
        return attached


class BestExpertOfGroupRouter(Router):
    """A router that ranks a group of experts by its best expert: `router_group_score=max`."""

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s, b, experts] -> weights and choice, each [s * b, experts]."""
        with groups_scored_by_their_best_expert():
            return super().routing(logits, *args, **kwargs)


def scores_groups_by_best(model: ModelConfig) -> bool:
    """Whether the routers of `model` rank groups of experts, and do so by their best expert."""
    return model.is_moe and model.router_num_groups > 0 and model.router_group_score == "max"


def set_router(mlp: Any, model: ModelConfig) -> None:
    """Let the MoE layer of spec `mlp` use the router of `model`; a dense feed-forward has none to set.

    The spec is a `ModuleSpec`, from Megatron-Core 0.19 on a partial call of the layer.
    """
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    if isinstance(submodules, MoESubmodules):
        submodules.router = BestExpertOfGroupRouter if scores_groups_by_best(model) else Router
