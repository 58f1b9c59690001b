"""The token dispatchers of MoE layers: one row each, which everything else reads. No torch import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DispatcherKind:
    """Properties of one dispatcher.

    Args:
        name: value of `parallel.dispatcher`, and of `moe_token_dispatcher_type` (transformer/transformer_config.py
            upstream).
        library: what it needs besides NCCL or gloo; empty where it needs nothing.
        needs_gpu: whether its kernels exist for GPUs alone.
        needs_peers: whether it needs experts on several ranks.
        pads_to_capacity: whether it goes with `model.pad_to_capacity`.
        overlaps_shared_experts: whether shared experts can run while tokens are dispatched.
        own_on_local: whether the `local` backend sends tokens itself (`moe_train.model.local.dispatch`): then they can
            be dispatched in FP8, and the bytes are counted.
        deduplicates: a token goes once to each node that has an expert of it, not once for each expert.
        needs_equal_counts: every rank has to have the same number of tokens.
        waits_on_host: the host waits for the number of tokens before it starts the experts.
        planned_as: row that the planner takes for it.
    """

    name: str
    planned_as: str
    library: str = ""
    needs_gpu: bool = False
    needs_peers: bool = False
    pads_to_capacity: bool = True
    overlaps_shared_experts: bool = False
    own_on_local: bool = False
    deduplicates: bool = False
    needs_equal_counts: bool = False
    waits_on_host: bool = True


ALLTOALL = DispatcherKind(name="alltoall", planned_as="alltoall", overlaps_shared_experts=True, own_on_local=True)
ALLGATHER = DispatcherKind(name="allgather", planned_as="alltoall", needs_equal_counts=True)
FLEX = DispatcherKind(
    name="flex", planned_as="flex", library="DeepEP", needs_gpu=True, needs_peers=True,
    pads_to_capacity=False, deduplicates=True, waits_on_host=False,
)  # fmt: skip
DISPATCHERS = {row.name: row for row in (ALLTOALL, ALLGATHER, FLEX)}
PLANNED = tuple(row.name for row in (FLEX, ALLTOALL))
"""Dispatchers that the planner distinguishes, fastest first."""
