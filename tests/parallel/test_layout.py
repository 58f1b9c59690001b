"""Ranks and coordinates as Megatron-Core counts them, and degrees that do not fit refused with values that do."""

from __future__ import annotations

import random
import re

import pytest

from parallel.errors import ConfigError
from parallel.layout import ParallelLayout

LAYOUTS = [
    ParallelLayout.resolve(tp=tp, pp=pp, vpp=1, cp=cp, ep=ep, etp=etp, dp=dp)
    for tp, pp, cp, ep, etp, dp in [
        (1, 1, 1, 1, 1, 1), (2, 1, 1, 1, 1, 2), (2, 2, 1, 2, 1, 1), (2, 2, 1, 2, 1, 2), (2, 2, 2, 4, 1, 1),
        (2, 2, 2, 4, 2, 2), (1, 4, 1, 4, 1, 4), (4, 1, 1, 2, 2, 3), (1, 2, 2, 3, 2, 3), (2, 3, 1, 2, 4, 4),
    ]
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_are_those_of_megatron_core(layout: ParallelLayout) -> None:
    """Ranks in one upstream group differ in that group's coordinate only, and stand in its order."""
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order)
    assert dense.world_size == expert.world_size == layout.world_size
    for generator, names in ((dense, {n: n for n in ("tp", "cp", "dp", "pp")}),
                             (expert, {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"})):  # fmt: skip
        for upstream, ours in names.items():
            others = [name for name in names.values() if name != ours]
            for group in generator.get_ranks(upstream):
                places = [layout.coordinates(rank) for rank in group]
                assert [getattr(place, ours) for place in places] == list(range(len(group)))
                for other in others:
                    assert len({getattr(place, other) for place in places}) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_has_its_own_coordinates_and_back(layout: ParallelLayout) -> None:
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank_of(tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp) == rank
        assert layout.expert_rank_of(etp=at.etp, ep=at.ep, edp=at.edp, pp=at.pp) == rank


def test_coordinates_outside_of_the_layout_are_refused() -> None:
    layout = ParallelLayout.resolve(tp=2, pp=2, vpp=1, cp=1, ep=2, etp=1)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=r"0 \.\. 3"):
            layout.coordinates(rank)
    with pytest.raises(ValueError, match="pp coordinate 2"):
        layout.rank_of(pp=2)
    with pytest.raises(ValueError, match="edp coordinate 1"):
        layout.expert_rank_of(edp=1)


def test_dp_follows_from_the_world_size_or_is_the_smallest_that_fits() -> None:
    degrees = {"tp": 2, "pp": 2, "vpp": 1, "cp": 1, "etp": 1}
    assert ParallelLayout.resolve(**degrees, ep=2).world_size == 4
    assert ParallelLayout.resolve(**degrees, ep=2, world_size=8).dp == 2
    assert ParallelLayout.resolve(**degrees, ep=2, dp=2).edp == 2
    wide = ParallelLayout.resolve(**degrees, ep=8)
    assert (wide.dp, wide.world_size, wide.edp) == (4, 16, 1)
    h800 = ParallelLayout.resolve(tp=1, pp=16, vpp=1, cp=1, ep=64, etp=1, dp=128)
    assert (h800.world_size, h800.edp) == (2048, 2)


WRONG = [
    ({"tp": 0}, None, "parallel.tp=0"),
    ({"tp": 2, "pp": 3}, 8, "2 x 3 x 1 = 6 does not divide the 8 ranks"),
    ({"ep": 3}, 8, "1 x 3 x 1 = 3 does not divide the 8 ranks"),
    ({"ep": 4, "dp": 2}, None, "1 x 4 x 1 = 4 does not divide the 2 ranks"),
    ({"etp": 4, "dp": 2}, None, "4 x 1 x 1 = 4 does not divide the 2 ranks"),
    ({"tp": 2, "dp": 2}, 8, "2 x 1 x 1 x 2 = 4, but there are 8 ranks"),
]


@pytest.mark.parametrize(("degrees", "world_size", "arithmetic"), WRONG, ids=[arithmetic for *_, arithmetic in WRONG])
def test_degrees_that_do_not_fit_are_refused_with_values_that_do(
    degrees: dict[str, int], world_size: int | None, arithmetic: str
) -> None:
    given = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, **degrees}
    with pytest.raises(ConfigError) as caught:
        ParallelLayout.resolve(**given, world_size=world_size)  # type: ignore[arg-type]
    assert arithmetic in str(caught.value)
    suggestions = re.findall(r"parallel\.(\w+)=(\d+)", caught.value.remedy)
    assert suggestions
    for name, value in suggestions:
        ParallelLayout.resolve(**{**given, name: int(value)}, world_size=world_size)  # type: ignore[arg-type]


def test_suggestions_of_random_layouts_work() -> None:
    def refusal(world_size: int | None, **degrees: int | None) -> str:
        try:
            ParallelLayout.resolve(**degrees, vpp=1, world_size=world_size)  # type: ignore[arg-type]
        except ConfigError as error:
            return error.cause
        return ""

    rng = random.Random(0)
    refused, outcomes = 0, set()
    for _ in range(500):
        given = {name: rng.choice((1, 2, 3, 4, 6)) for name in ("tp", "pp", "cp", "ep", "etp")}
        world_size = rng.choice((None, 8, 12, 16))
        dp = rng.choice((None, 1, 2)) if world_size is None else None
        try:
            layout = ParallelLayout.resolve(**given, vpp=1, dp=dp, world_size=world_size)
        except ConfigError as error:
            refused += 1
            for name, value in re.findall(r"parallel\.(\w+)=(\d+)", error.remedy):
                fixed = {**given, "dp": dp, name: int(value)}
                second = refusal(world_size, **fixed)
                if second:  # dense and expert ranks can be wrong at once: the fix reaches the second
                    outcomes.add(("parallel.etp x ep x pp" in error.cause, "parallel.etp x ep x pp" in second))
        else:
            assert layout.world_size == (world_size or layout.world_size)
            assert layout.world_size == layout.etp * layout.ep * layout.pp * layout.edp
    assert refused > 100
    assert outcomes <= {(False, True)}
