"""Time of one message pattern between accelerators. Pure functions; no torch import.

Ranks are numbered as Megatron-Core does it: tp fastest, then cp, dp and pp; for experts etp, ep, edp, pp. A group is
described by its size and by the distance between its members: tp ranks are neighbours, dp ranks tp x cp apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from parallel.planner.hardware import MICRO, Hardware


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: how many, and how far apart neighbours are."""

    size: int
    stride: int = 1

    def in_domain(self, hardware: Hardware) -> int:
        """Members within one NVLink domain."""
        return max(1, min(self.size, hardware.domain_gpus // self.stride))

    def domains(self, hardware: Hardware) -> int:
        """NVLink domains that the group spans."""
        return -(-self.size // self.in_domain(hardware))

    def crosses_pods(self, hardware: Hardware) -> bool:
        """Whether it leaves one non-blocking part of the network."""
        return self.size * self.stride > hardware.pod_gpus


def network_rate(hardware: Hardware, group: Group) -> float:
    """Bytes/s that one GPU sends to other domains."""
    spine = hardware.spine_fraction if group.crosses_pods(hardware) else 1.0
    return hardware.network_bytes_per_s * spine


def ring(hardware: Hardware, group: Group, gathered: float, messages: int = 1) -> float:
    """Seconds of an all-gather or reduce-scatter of `gathered` bytes in all, each rank holding one part; of so many
    one after another.

    A ring through all members passes each NVLink link, and leaves a domain through the network cards of all members
    there.
    """
    if group.size <= 1:
        return 0.0
    inside = group.in_domain(hardware)
    moved = gathered * (group.size - 1) / group.size
    if group.domains(hardware) == 1:
        return moved / hardware.domain_bytes_per_s + messages * hardware.domain_latency_us * MICRO
    rate = min(hardware.domain_bytes_per_s, inside * network_rate(hardware, group))
    return moved / rate + messages * hardware.network_latency_us * MICRO


def relay(hardware: Hardware, group: Group, gathered: float) -> float:
    """Seconds in which each member has passed its part of `gathered` bytes once around the group, neighbour by
    neighbour.

    Every step waits for the slowest link, which between domains is one network card.
    """
    if group.size <= 1:
        return 0.0
    moved = gathered * (group.size - 1) / group.size
    if group.domains(hardware) == 1:
        return moved / hardware.domain_bytes_per_s + hardware.domain_latency_us * MICRO * (group.size - 1)
    rate = min(hardware.domain_bytes_per_s, network_rate(hardware, group))
    return moved / rate + hardware.network_latency_us * MICRO * (group.size - 1)


def send(hardware: Hardware, group: Group, size: float) -> float:
    """Seconds of one message of `size` bytes between neighbours of a group."""
    if group.size <= 1:
        return 0.0
    if group.size * group.stride <= hardware.domain_gpus:
        return size / hardware.domain_bytes_per_s + hardware.domain_latency_us * MICRO
    return size / network_rate(hardware, group) + hardware.network_latency_us * MICRO


@dataclass(frozen=True)
class Routing:
    """How tokens choose experts: how many, and of at most how many of how many groups (0: of all)."""

    topk: int
    groups: int = 0
    groups_chosen: int = 0


def places_visited(places: int, routing: Routing) -> float:
    """Different places (ranks, nodes) out of `places` that hold an expert of a token, on average.

    Experts are chosen independently, with group-limited routing from the chosen groups alone. Groups lie in order: a
    group spans several places, or a place holds several groups.
    """
    if places <= 1:
        return float(places)
    groups, chosen = routing.groups, routing.groups_chosen
    if not groups or not 0 < chosen < groups:
        return places * (1 - (1 - 1 / places) ** routing.topk)
    if places >= groups:
        reachable = places * chosen / groups
        return reachable * (1 - (1 - 1 / reachable) ** routing.topk) if reachable > 1 else 1.0
    visited = 0.0
    for place in range(places):
        groups_here = groups * (place + 1) // places - groups * place // places
        visited += 1 - _missed(groups_here, routing)
    return visited


def _missed(groups_here: int, routing: Routing) -> float:
    """Probability that a token chooses no expert of a place that holds `groups_here` of the groups.

    How many of these are among the chosen ones is distributed hypergeometrically.
    """
    groups, chosen = routing.groups, routing.groups_chosen
    missed = 0.0
    for both in range(min(groups_here, chosen) + 1):
        probability = comb(groups_here, both) * comb(groups - groups_here, chosen - both) / comb(groups, chosen)
        missed += probability * (1 - both / chosen) ** routing.topk
    return missed


def all_to_all(
    hardware: Hardware, group: Group, tokens: float, width_bytes: float, routing: Routing, deduplicated: bool
) -> float:
    """Seconds to send `tokens` tokens of `width_bytes` from each rank to the ranks of their experts, or back.

    Args:
        deduplicated: a token crosses the network once for each node (DeepEP, HybridEP), then NVLink once for each rank;
            else it is sent once for each expert (NCCL all-to-all).
    """
    if group.size <= 1:
        return 0.0
    domains, inside = group.domains(hardware), group.in_domain(hardware)
    if deduplicated:
        nodes, ranks = places_visited(domains, routing), places_visited(group.size, routing)
    else:
        nodes, ranks = float(routing.topk), float(routing.topk)
    over_network = tokens * width_bytes * nodes * (domains - 1) / domains
    over_links = tokens * width_bytes * ranks * (inside - 1) / inside
    links = over_links / hardware.domain_bytes_per_s
    if domains == 1:
        return links + 2 * hardware.domain_latency_us * MICRO
    return max(links, over_network / network_rate(hardware, group)) + 2 * hardware.network_latency_us * MICRO


def network_bytes(
    hardware: Hardware, group: Group, tokens: float, width_bytes: float, routing: Routing, deduplicated: bool
) -> float:
    """Bytes that one rank sends to other domains in the same pattern."""
    domains = group.domains(hardware)
    if group.size <= 1 or domains == 1:
        return 0.0
    nodes = places_visited(domains, routing) if deduplicated else float(routing.topk)
    return tokens * width_bytes * nodes * (domains - 1) / domains
