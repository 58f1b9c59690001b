"""Position of groups of ranks on the network, and the bytes that they send over it. Pure functions; no torch import."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.dispatchers import DISPATCHERS
from parallel.layout import ParallelLayout
from parallel.planner import network
from parallel.planner.hardware import Hardware
from parallel.planner.layer_time import routing_of
from parallel.planner.memory import Weights
from parallel.planner.network import Group
from parallel.planner.software import Software
from parallel.planner.workload import Workload


@dataclass(frozen=True)
class Placement:
    """One kind of group.

    Args:
        kind: tp, cp, dp, pp, ep, etp or edp.
        size: ranks in a group.
        groups: groups of that kind in the run.
        domains: NVLink domains that one spans.
        crosses_pods: whether some group leaves a non-blocking part of the network.
        network_bytes: that one rank sends to other domains in a step.
    """

    kind: str
    size: int
    groups: int
    domains: int
    crosses_pods: bool
    network_bytes: float


def groups_of(layout: ParallelLayout) -> dict[str, Group]:
    """Every kind of group: its size and the distance between its members, as Megatron-Core numbers ranks."""
    per_stage = layout.world_size // layout.pp
    return {
        "tp": Group(layout.tp),
        "cp": Group(layout.cp, layout.tp),
        "dp": Group(layout.dp, layout.tp * layout.cp),
        "pp": Group(layout.pp, per_stage),
        "etp": Group(layout.etp),
        "ep": Group(layout.ep, layout.etp),
        "edp": Group(layout.edp, layout.ep * layout.etp),
    }


def members(layout: ParallelLayout, kind: str, rank: int) -> tuple[int, ...]:
    """The ranks of the group of a kind that `rank` belongs to, in order."""
    group = groups_of(layout)[kind]
    place = rank // group.stride % group.size
    first = rank - place * group.stride
    return tuple(first + number * group.stride for number in range(group.size))


def placements(workload: Workload, hardware: Hardware, software: Software, weights: Weights) -> list[Placement]:
    """All kinds of groups of a run, with what a rank of the heaviest stage sends over the network in a step."""
    layout, model, e = workload.layout, workload.model, workload.element
    layers = max(stage.count("t") + stage.count("m") for stage in workload.stages) * layout.vpp
    width = model.hidden_size * e
    passes = workload.micro_batches * layers
    result = []
    for kind, group in groups_of(layout).items():
        sent = 0.0
        if group.domains(hardware) > 1:
            share = (group.size - 1) / group.size / group.in_domain(hardware)
            if kind in ("tp", "etp"):
                sent = passes * 10 * workload.tokens * width * share
            elif kind == "cp":
                sent = (
                    passes
                    * 6
                    * workload.tokens
                    * (group.size - 1)
                    * e
                    * 2
                    * model.kv_heads
                    * model.attention_head_dim
                    / layout.tp
                )
                sent /= group.in_domain(hardware)
            elif kind == "dp":
                sent = (workload.grad_bytes + e) * weights.shared * share
            elif kind == "edp":
                sent = (workload.grad_bytes + e) * weights.experts * share
            elif kind == "pp":
                sent = 2 * workload.micro_batches * layout.vpp * workload.split_tokens * width
            elif model.num_experts:
                there = network.network_bytes(
                    hardware,
                    group,
                    workload.split_tokens,
                    width,
                    routing_of(workload),
                    DISPATCHERS[software.dispatcher].deduplicates,
                )
                there_width = (1 + 4 / 128) / e if software.fp8_dispatch else 1.0
                sent = 2 * passes * there * (1 + there_width)
        result.append(
            Placement(
                kind,
                group.size,
                layout.world_size // group.size,
                group.domains(hardware),
                group.crosses_pods(hardware),
                sent,
            )
        )
    return result


@dataclass(frozen=True)
class NodeSpan:
    """Nodes that the groups of one dimension span when ranks fill one node after another.

    Args:
        name: tp, cp, dp, pp, ep or etp.
        size: ranks of a group.
        groups: how many there are.
        nodes: nodes that the widest group lies on.
        per_node: most groups that have a rank on one node.
    """

    name: str
    size: int
    groups: int
    nodes: int
    per_node: int

    def __str__(self) -> str:
        where = "within a node" if self.nodes == 1 else f"over {self.nodes:,} nodes"
        return f"{self.name}: {self.groups:,} of {self.size:,} ranks, each {where}, {self.per_node:,} on a node"


def node_spans(layout: ParallelLayout, ranks_per_node: int) -> list[NodeSpan]:
    """For each dimension with more than one rank, those that stay together first."""
    members: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        keys = {
            "tp": (at.cp, at.dp, at.pp),
            "etp": (at.ep, at.edp, at.pp),
            "cp": (at.tp, at.dp, at.pp),
            "ep": (at.etp, at.edp, at.pp),
            "dp": (at.tp, at.cp, at.pp),
            "pp": (at.tp, at.cp, at.dp),
        }
        for name, key in keys.items():
            members.setdefault(name, {}).setdefault(key, []).append(rank)
    result = []
    for name, groups in members.items():
        size = len(next(iter(groups.values())))
        if size == 1:
            continue
        spans = [{rank // ranks_per_node for rank in ranks} for ranks in groups.values()]
        on_node: dict[int, int] = {}
        for span in spans:
            for node in span:
                on_node[node] = on_node.get(node, 0) + 1
        result.append(NodeSpan(name, size, len(groups), max(map(len, spans)), max(on_node.values())))
    return result
