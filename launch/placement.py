"""Which nodes the groups of a layout lie on, when ranks fill one node after another. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Placement:
    """The groups of one dimension.

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


def placements(layout: ParallelLayout, ranks_per_node: int) -> list[Placement]:
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
    found = []
    for name, groups in members.items():
        size = len(next(iter(groups.values())))
        if size == 1:
            continue
        spans = [{rank // ranks_per_node for rank in ranks} for ranks in groups.values()]
        on_node: dict[int, int] = {}
        for span in spans:
            for node in span:
                on_node[node] = on_node.get(node, 0) + 1
        found.append(Placement(name, size, len(groups), max(map(len, spans)), max(on_node.values())))
    return found
