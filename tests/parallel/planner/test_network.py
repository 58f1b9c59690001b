"""Messages between accelerators: each formula against a value that is computed in another way."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from statistics import mean

import pytest

from moe_train.config.cluster import ClusterConfig
from parallel.planner import network
from parallel.planner.hardware import Hardware
from parallel.planner.network import Group, Routing

H800 = Hardware.of(ClusterConfig())


def enumerated(places: int, routing: Routing) -> float:
    """Different places of a token's experts: the mean over every choice of groups and of one expert after another."""
    groups = routing.groups or 1
    experts = [(place, group) for place in range(places * groups) for group in [place // places]]
    held = [(number * places // len(experts), group) for number, (_, group) in enumerate(experts)]
    visited = []
    for chosen in combinations(range(groups), routing.groups_chosen or groups):
        reachable = [place for place, group in held if group in chosen]
        visited.append(mean(len(set(choice)) for choice in product(reachable, repeat=routing.topk)))
    return mean(visited)


@pytest.mark.parametrize(
    ("places", "routing"),
    [
        (2, Routing(1)), (2, Routing(4)), (5, Routing(3)), (8, Routing(2)),
        (8, Routing(2, 4, 2)), (4, Routing(3, 4, 2)), (4, Routing(3, 4, 1)),  # as many places as groups, and more
        (2, Routing(3, 4, 2)), (2, Routing(3, 4, 3)), (3, Routing(2, 6, 3)), (2, Routing(3, 4, 4)),  # fewer
    ],
)  # fmt: skip
def test_places_of_a_token_are_those_of_an_enumeration(places: int, routing: Routing) -> None:
    assert network.places_visited(places, routing) == pytest.approx(enumerated(places, routing), rel=1e-12)


def test_half_as_many_nodes_do_not_halve_the_nodes_of_a_token() -> None:
    """4 of 8 groups may lie on all 4 nodes: 4 x (1 - sum over j of hypergeometric(j) x (1 - j / 4)^8)."""
    missed = (15 * 1 + 40 * 0.75**8 + 15 * 0.5**8) / 70
    assert network.places_visited(4, Routing(8, 8, 4)) == pytest.approx(4 * (1 - missed))
    assert network.places_visited(8, Routing(8, 8, 4)) == pytest.approx(4 * (1 - 0.75**8))


def test_one_place_is_always_visited() -> None:
    assert network.places_visited(1, Routing(8)) == 1
    assert network.places_visited(8, Routing(8, 8, 1)) == 1


def test_without_a_limit_on_groups_a_token_reaches_all_places() -> None:
    for routing in (Routing(2, 8, 0), Routing(2, 8, 8), Routing(2)):
        assert network.places_visited(8, routing) == pytest.approx(8 * (1 - (7 / 8) ** 2))


def test_dispatch_takes_the_slower_of_both_networks() -> None:
    """Once a node over the network and once a rank over NVLink, or once an expert over both; two latencies."""
    tokens, width, group, routing = 4096, 14336, Group(64), Routing(8, 8, 4)
    nodes, ranks = 4 * (1 - 0.75**8), 32 * (1 - (31 / 32) ** 8)
    over_network, over_links = tokens * width * nodes * 7 / 8, tokens * width * ranks * 7 / 8
    latency = 2 * H800.network_latency_us * 1e-6
    slower = max(over_network / H800.network_bytes_per_s, over_links / H800.domain_bytes_per_s)
    assert network.all_to_all(H800, group, tokens, width, routing, True) == pytest.approx(slower + latency)
    assert network.network_bytes(H800, group, tokens, width, routing, True) == pytest.approx(over_network)
    each = tokens * width * 8 * 7 / 8
    expected = each / H800.network_bytes_per_s + latency
    assert network.all_to_all(H800, group, tokens, width, routing, False) == pytest.approx(expected)
    assert network.network_bytes(H800, group, tokens, width, routing, False) == pytest.approx(each)


def test_dispatch_within_a_node_stays_on_its_links() -> None:
    each = 4096 * 14336 * 8 * (1 - (7 / 8) ** 4) * 7 / 8
    expected = each / H800.domain_bytes_per_s + 2 * H800.domain_latency_us * 1e-6
    assert network.all_to_all(H800, Group(8), 4096, 14336, Routing(4), True) == pytest.approx(expected)
    assert network.network_bytes(H800, Group(8), 4096, 14336, Routing(4), True) == 0
    each = 4096 * 14336 * 4 * 7 / 8
    expected = each / H800.domain_bytes_per_s + 2 * H800.domain_latency_us * 1e-6
    assert network.all_to_all(H800, Group(8), 4096, 14336, Routing(4), False) == pytest.approx(expected)
    assert network.all_to_all(H800, Group(1), 4096, 14336, Routing(4), True) == 0


@pytest.mark.parametrize(
    ("group", "inside", "domains", "leaves_pod"),
    [(Group(1), 1, 1, False), (Group(8), 8, 1, False), (Group(4, 2), 4, 1, False), (Group(8, 2), 4, 2, False),
     (Group(16), 8, 2, False), (Group(8, 8), 1, 8, False), (Group(4, 16), 1, 4, False), (Group(64, 32), 1, 64, False),
     (Group(2048), 8, 256, False), (Group(2, 2048), 1, 2, True), (Group(65, 32), 1, 65, True)],
)  # fmt: skip
def test_members_of_a_group_are_counted_by_node(group: Group, inside: int, domains: int, leaves_pod: bool) -> None:
    """Against the ranks themselves: nodes have 8 GPUs, a pod 2,048."""
    ranks = [group.stride * member for member in range(group.size)]
    nodes = [rank // 8 for rank in ranks]
    assert (max(map(nodes.count, nodes)), len(set(nodes))) == (inside, domains)
    assert (group.in_domain(H800), group.domains(H800)) == (inside, domains)
    assert group.crosses_pods(H800) == leaves_pod


def test_the_spine_of_the_network_slows_groups_that_leave_their_pod() -> None:
    tapered = replace(H800, spine_fraction=0.5)
    near, far = Group(64, 32), Group(128, 32)
    assert network.network_rate(tapered, near) == H800.network_bytes_per_s
    assert network.network_rate(tapered, far) == H800.network_bytes_per_s / 2


def test_a_relay_passes_each_part_once_around() -> None:
    """15 steps of a sixteenth each: over one network card between nodes, over NVLink within one."""
    step = 1e9 / 16 / H800.network_bytes_per_s + H800.network_latency_us * 1e-6
    assert network.relay(H800, Group(16), 1e9) == pytest.approx(15 * step)
    step = 1e9 / 8 / H800.domain_bytes_per_s + H800.domain_latency_us * 1e-6
    assert network.relay(H800, Group(8), 1e9) == pytest.approx(7 * step)
    assert network.relay(H800, Group(1), 1e9) == 0


def test_a_ring_has_one_latency_for_each_of_its_messages() -> None:
    """(n - 1) / n of the bytes, through as many network cards as a node has members."""
    cards = min(H800.domain_bytes_per_s, 4 * H800.network_bytes_per_s)
    expected = 1e8 * 7 / 8 / cards + 3 * H800.network_latency_us * 1e-6
    assert network.ring(H800, Group(8, 2), 1e8, messages=3) == pytest.approx(expected)
    expected = 1e8 * 3 / 4 / H800.domain_bytes_per_s + 2 * H800.domain_latency_us * 1e-6
    assert network.ring(H800, Group(4, 2), 1e8, messages=2) == pytest.approx(expected)
    expected = 1e8 / 2 / H800.domain_bytes_per_s + H800.domain_latency_us * 1e-6
    assert network.ring(H800, Group(2), 1e8) == pytest.approx(expected)
    assert network.ring(H800, Group(1), 1e8) == 0


def test_neighbours_on_one_node_send_over_nvlink() -> None:
    expected = 1e8 / H800.domain_bytes_per_s + H800.domain_latency_us * 1e-6
    assert network.send(H800, Group(2, 4), 1e8) == pytest.approx(expected)
    expected = 1e8 / H800.network_bytes_per_s + H800.network_latency_us * 1e-6
    assert network.send(H800, Group(2, 8), 1e8) == pytest.approx(expected)
    assert network.send(H800, Group(1, 8), 1e8) == 0
