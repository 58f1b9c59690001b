"""The table of dispatchers against Megatron-Core and against what the planner distinguishes."""

from __future__ import annotations

import typing

from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.dispatchers import ALLTOALL, DISPATCHERS, FLEX, PLANNED


def test_megatron_knows_every_dispatcher() -> None:
    names = typing.get_args(typing.get_type_hints(TransformerConfig)["moe_token_dispatcher_type"])
    assert {row.name for row in DISPATCHERS.values()} == set(names)


def test_the_planner_knows_what_each_is_planned_as() -> None:
    assert {row.planned_as for row in DISPATCHERS.values()} == set(PLANNED)
    assert all(DISPATCHERS[name].planned_as == name for name in PLANNED)


def test_one_dispatcher_works_everywhere() -> None:
    """Rules suggest it, and plans without experts on several ranks name it."""
    assert not ALLTOALL.library
    assert not ALLTOALL.needs_gpu
    assert not ALLTOALL.needs_peers
    assert ALLTOALL.pads_to_capacity
    assert FLEX.deduplicates
    assert not FLEX.waits_on_host
