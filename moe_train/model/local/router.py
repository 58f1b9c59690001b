"""Routers that differ from Megatron-Core's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
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

    def routing_matrix(self) -> Tensor:
        """[h, experts], in the precision of routing."""
        weight: Tensor = self.weight.detach()
        precision = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, weight.dtype)
        return weight.to(precision).t()

    def chosen_experts(self, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts of each token: x [t, h], and `routing_matrix` -> [t, topk] each.

        What `forward` computes in evaluation, without [t, experts] tensors of weights and choices: as upstream's
        `topk_routing_with_score_function` (transformer/moe/moe_utils.py).

        Raises:
            NotImplementedError: the score function is unknown here.
        """
        config = self.config
        logits = torch.mm(x.to(matrix.dtype), matrix)
        if self.bias is not None:
            logits += self.bias
        if self.score_function == "softmax" and config.moe_router_pre_softmax:
            weights, experts = self._best(logits.softmax(dim=-1, dtype=torch.float32).type_as(logits))
        elif self.score_function == "softmax":
            best, experts = self._best(logits)
            weights = best.softmax(dim=-1, dtype=torch.float32).type_as(logits)
        elif self.score_function == "sigmoid":
            scores = logits.float().sigmoid_().type_as(logits)
            _, experts = self._best(scores if self.expert_bias is None else scores + self.expert_bias)
            weights = scores.gather(1, experts)
            if self.topk > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            raise NotImplementedError(f"router score function {self.score_function}")
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return weights, experts

    def _best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The `topk` highest scores of each row of [t, experts] within the allowed groups of experts: [t, topk]."""
        config = self.config
        if not config.moe_router_group_topk:
            values, experts = scores.topk(self.topk, dim=1)
            return values, experts
        tokens, count = scores.shape
        best: tuple[Tensor, Tensor] = moe_utils.group_limited_topk(
            scores, self.topk, tokens, count, config.moe_router_num_groups, config.moe_router_group_topk
        )
        return best


class BestExpertOfGroupRouter(Router):
    """A router that ranks a group of experts by its best expert: `router_group_score=max`."""

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s, b, experts] -> weights and choice, each [s * b, experts]."""
        with groups_scored_by_their_best_expert():
            return super().routing(logits, *args, **kwargs)

    def chosen_experts(self, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """As `Router`'s."""
        with groups_scored_by_their_best_expert():
            return super().chosen_experts(x, matrix)


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
