"""Muon for matrices and AdamW for the rest, by Megatron-Core (from 0.19 on) and emerging-optimizers.

Megatron-Core takes Muon for parameters with two dimensions. The `local` backend has the experts of a layer in one
parameter [experts, out, in], so a further row of its registry orthogonalises each of these matrices by itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer import emerging_optimizers as upstream
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moe_train.config.optimizer import OptimizerConfig as Options
from parallel.runtime import optimizer_registry

NAME = "grouped_muon"
"""Of the row in Megatron-Core's registry."""


class GroupedMuon(upstream.TensorParallelMuon):
    """Megatron-Core's Muon, also for the weights of all local experts in one parameter."""

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """[out, in] or [experts, out, in] of this rank -> the update, of the same shape."""
        if grad.dim() == 2:
            update: Tensor = super().orthogonalize(p, grad, **kwargs)
            return update
        matrix: Any = SimpleNamespace(expert_tp=True, partition_dim=p.partition_dim - 1)  # type: ignore[attr-defined]
        return torch.stack([super(GroupedMuon, self).orthogonalize(matrix, expert, **kwargs) for expert in grad])


def _by_adamw(parameter: Tensor) -> bool:
    """Embedding, output head, norms and biases."""
    return getattr(parameter, "is_embedding_or_output_parameter", False) or parameter.dim() == 1


def register() -> None:
    """Add `NAME` to Megatron-Core's registry."""
    by_adamw = ParamKey(predicate=ParamPredicate(name="not_a_matrix", fn=_by_adamw))
    entry = upstream.EmergingOptimizerEntry(
        optimizer_cls=GroupedMuon,
        config_to_kwargs=upstream._muon_config_to_kwargs,
        default_param_overrides={by_adamw: {"optimizer": "adam"}},
    )
    optimizer_registry.register(NAME, entry)


def megatron_options(options: Options, fp32: bool, distributed: bool) -> dict[str, Any]:
    """Fields of Megatron-Core's OptimizerConfig.

    Args:
        fp32: whether weights are in fp32.
        distributed: whether data-parallel ranks share the optimizer state.
    """
    return {
        "optimizer": NAME,
        "muon_momentum": options.muon_momentum,
        "muon_nesterov": options.muon_nesterov,
        "muon_num_ns_steps": options.muon_ns_steps,
        "muon_coefficient_type": options.muon_coefficients,
        "muon_scale_mode": options.muon_scale_mode,
        "muon_extra_scale_factor": options.muon_scale_factor,
        "muon_split_qkv": options.muon_split_qkv,
        "muon_tp_mode": options.muon_tp_mode,
        "muon_fp32_matmul_prec": options.muon_matmul_precision or ("highest" if fp32 else "medium"),
        "use_distributed_optimizer": False,
        "use_layer_wise_distributed_optimizer": distributed and not fp32,
    }


def distribute_fp32(optimizer: MegatronOptimizer, config: OptimizerConfig) -> LayerWiseDistributedOptimizer:
    """Spread the parameters of an optimizer over data-parallel ranks.

    With `use_layer_wise_distributed_optimizer` and fp32 weights upstream puts torch's own optimizers where it later
    looks for the methods of Megatron-Core's (layer_wise_optimizer.py, `get_grad_norm`).
    """
    return LayerWiseDistributedOptimizer(
        optimizer.chained_optimizers, config, ProcessGroupCollection.use_mpu_process_groups()
    )
