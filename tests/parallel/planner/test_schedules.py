"""The order of passes of one rank, written out by hand for small pipelines."""

from __future__ import annotations

from collections import Counter

import pytest

from parallel.planner.schedules import SCHEDULES, Pass, holders, impossible, order, smallest_micro_batches, stages_of


def shown(passes: list[Pass]) -> str:
    """F0.1: forward pass on stage 0 of micro-batch 1. FB0.3/3.1: with the backward pass on stage 3 of micro-batch 1."""
    return " ".join(
        f"{one.kind}{one.stage}.{one.micro_batch}"
        + (f"/{one.back_stage}.{one.back_micro_batch}" if one.kind == "FB" else "")
        for one in passes
    )


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3"),
        (1, "F1.0 F1.1 B1.0 F1.2 B1.1 F1.3 B1.2 B1.3"),
        (2, "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3"),
    ],
)
def test_1f1b(rank: int, expected: str) -> None:
    """Also as an interleaved schedule with one chunk on each rank, for any number of micro-batches."""
    assert shown(order("1f1b", 3, 1, rank, 4)) == expected
    assert shown(order("interleaved", 3, 1, rank, 4)) == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1"),
        (1, "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"),
    ],
)
def test_interleaved(rank: int, expected: str) -> None:
    """Each rank holds every second stage of four."""
    assert shown(order("interleaved", 2, 2, rank, 2)) == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3"),
        (1, "F1.0 F1.1 I1.0 F1.2 I1.1 W1.0 F1.3 I1.2 W1.1 I1.3 W1.2 W1.3"),
        (2, "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 F2.3 I2.3 W2.1 W2.2 W2.3"),
    ],
)
def test_zb1p(rank: int, expected: str) -> None:
    assert shown(order("zb1p", 3, 1, rank, 4)) == expected


def test_zb1p_with_fewer_micro_batches_than_ranks() -> None:
    """Weight gradients fill the bubbles once no forward pass is left, before as many wait as memory allows."""
    assert shown(order("zb1p", 5, 1, 2, 3)) == "F2.0 F2.1 F2.2 I2.0 I2.1 W2.0 I2.2 W2.1 W2.2"


DUALPIPE = {
    0: "F0.0 F0.2 F0.4 F3.1 I3.1 W3.1 F3.3 FB0.6/3.3 FB3.5/0.0 B3.5 FB3.7/0.2 B3.7 I0.4 W0.4 I0.6 W0.6",
    1: "F1.0 F2.1 F1.2 F2.3 F1.4 B2.1 FB2.5/1.0 FB1.6/2.3 FB2.7/1.2 B2.5 B1.4 I2.7 I1.6 W2.7 W1.6",
}


def test_dualpipe() -> None:
    """The eight steps of deepseek-ai/DualPipe. Its halves mirror each other: even micro-batches in one direction, odd
    ones in the other."""
    for rank, expected in DUALPIPE.items():
        passes = order("dualpipe", 4, 1, rank, 8)
        assert shown(passes) == expected
        assert order("dualpipe", 4, 1, 3 - rank, 8) == [
            one._replace(
                micro_batch=one.micro_batch ^ 1,
                back_micro_batch=one.back_micro_batch ^ 1 if one.kind == "FB" else -1,
            )
            for one in passes
        ]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 FB0.3/3.1 FB3.2/0.0 B3.2 FB3.3/0.1 B3.3 I0.2 W0.2 I0.3 W0.3"),
        (1, "F1.0 F2.0 F1.1 F2.1 F1.2 B2.0 FB2.2/1.0 FB1.3/2.1 FB2.3/1.1 B2.2 B1.2 I2.3 I1.3 W2.3 W1.3"),
    ],
)
def test_dualpipev(rank: int, expected: str) -> None:
    assert shown(order("dualpipev", 2, 1, rank, 4)) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 4, 6])
def test_each_rank_runs_each_pass_of_its_stages_once(schedule: str, pp: int) -> None:
    """From the fewest micro-batches that a schedule is defined for, which may be fewer than ranks."""
    vpp = 3 if schedule == "interleaved" else 1
    for micro_batches in range(smallest_micro_batches(schedule, pp), 4 * pp + 1):
        if impossible(schedule, pp, vpp, micro_batches):
            continue
        done: Counter[tuple[str, int, int]] = Counter()
        for rank in range(pp):
            for one in order(schedule, pp, vpp, rank, micro_batches):
                assert rank in holders(schedule, pp, one.stage)
                parts = {"B": "IW", "FB": "F"}.get(one.kind, one.kind)
                done.update((kind, one.stage, one.micro_batch) for kind in parts)
                if one.kind == "FB":
                    assert rank in holders(schedule, pp, one.back_stage)
                    done.update((kind, one.back_stage, one.back_micro_batch) for kind in "IW")
        stages = range(stages_of(schedule, pp, vpp))
        assert done == Counter((kind, s, m) for kind in "FIW" for s in stages for m in range(micro_batches))


def test_stages_and_who_holds_them() -> None:
    assert [stages_of(schedule, 4, 3) for schedule in SCHEDULES] == [4, 12, 4, 4, 8]
    assert [holders("1f1b", 4, stage) for stage in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [holders("interleaved", 4, stage) for stage in (3, 4, 11)] == [(3,), (0,), (3,)]
    assert [holders("dualpipe", 4, stage) for stage in range(4)] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert [holders("dualpipev", 4, stage) for stage in range(8)] == [(s,) for s in (0, 1, 2, 3, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "micro_batches", "reason"),
    [
        ("1f1b", 4, 1, 0, "1f1b over 4 ranks needs at least 1 micro-batches, not 0"),
        ("zb1p", 4, 1, 0, "zb1p over 4 ranks needs at least 1 micro-batches, not 0"),
        ("interleaved", 4, 2, 3, "interleaved over 4 ranks needs at least 4 micro-batches, not 3"),
        ("interleaved", 4, 2, 6, "interleaved over 4 ranks needs a multiple of 4 micro-batches, not 6"),
        ("dualpipe", 4, 1, 7, "dualpipe over 4 ranks needs at least 8 micro-batches, not 7"),
        ("dualpipe", 4, 1, 9, "dualpipe needs even numbers of ranks and micro-batches, not 4 and 9"),
        ("dualpipe", 3, 1, 6, "dualpipe needs even numbers of ranks and micro-batches, not 3 and 6"),
        ("dualpipev", 4, 1, 7, "dualpipev over 4 ranks needs at least 8 micro-batches, not 7"),
    ],
)
def test_the_reason_why_a_schedule_is_impossible(
    schedule: str, pp: int, vpp: int, micro_batches: int, reason: str
) -> None:
    assert impossible(schedule, pp, vpp, micro_batches) == reason
    with pytest.raises(ValueError, match=reason):
        order(schedule, pp, vpp, 0, micro_batches)


def test_the_fewest_micro_batches_are_possible() -> None:
    least = {schedule: smallest_micro_batches(schedule, 4) for schedule in SCHEDULES}
    assert least == {"1f1b": 1, "interleaved": 4, "zb1p": 1, "dualpipe": 8, "dualpipev": 8}
    assert [impossible(schedule, 4, 2, count) for schedule, count in least.items()] == [""] * 5
    assert impossible("interleaved", 4, 1, 6) == impossible("dualpipev", 3, 1, 7) == ""
