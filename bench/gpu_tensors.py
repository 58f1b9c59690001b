"""Gradients of a run by the global names of their parameters, which do not depend on the backend, and how far apart."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from moe_train.checkpoint.state import model_state
from moe_train.run import Run

SMALL = 1e-3
"""A gradient below this part of the largest one's norm is compared with it instead of with itself."""


def gradients_of(run: Run) -> dict[str, Tensor]:
    """The gradient of every parameter, in fp32 on the CPU, after a step on the only rank of a run.

    Megatron-Core describes the gradients as it describes weights for a checkpoint, which has one name for a parameter
    in any module.
    """
    parameters = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    gradients: dict[str, Tensor] = {}
    # Addresses, not tensors: many shards are the parameters themselves, whose data are exchanged here and back.
    before = [shard.data.data_ptr() for shard in _shards(run)]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad.float().view(parameter.shape).clone()
        for address, shard in zip(before, _shards(run), strict=True):
            if address == shard.data.data_ptr():  # a buffer
                continue
            whole = gradients.setdefault(shard.key, torch.zeros(shard.global_shape))
            whole[shard.global_slice()] = shard.data.detach().float().cpu()
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
    return gradients


def _shards(run: Run) -> list[ShardedTensor]:
    state = model_state(run.chunks)
    apply_factories(state)  # splits gate and up of SwiGLU, each of which has a name of its own
    return [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor) and shard.data is not None]


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Norms of differences over norms: of everything, and of the parameter that differs most; names of one side only
    are counted. A NaN is the largest difference."""
    shared = ours.keys() & theirs.keys()
    norms = {name: float(theirs[name].norm()) for name in shared}
    apart = {name: float((ours[name] - theirs[name]).norm()) for name in shared}
    floor = SMALL * max(norms.values())
    relative = {name: apart[name] / max(norms[name], floor) for name in shared}
    name = max(relative, key=lambda parameter: (relative[parameter] != relative[parameter], relative[parameter]))
    return {
        "gradient_difference": _norm(apart) / _norm(norms),
        "worst_gradient_difference": relative[name],
        "worst_parameter": name,
        "parameters": len(shared),
        "missing_parameters": len(ours.keys() ^ theirs.keys()),
    }


def _norm(norms: dict[str, float]) -> float:
    return sum(norm * norm for norm in norms.values()) ** 0.5
