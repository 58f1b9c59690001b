"""The simulated pipeline against closed forms: time, bubble, activations in flight, uneven stages."""

from __future__ import annotations

from itertools import pairwise

import pytest

from parallel.planner.schedules import Pass, order, stages_of
from parallel.planner.simulation import StageTime, Timeline, estimated, simulate, step_time

F, B, W = 1.0, 2.2, 0.7  # B is the whole backward pass, W its part for weights
EVEN = StageTime(F, B, W, overlapped=0.9)
PAIRS = [*((pp, pp * k) for pp in (2, 4, 6, 8, 10) for k in range(2, 22)), (12, 24), (16, 32), (16, 64), (16, 128)]


def run(schedule: str, pp: int, micro_batches: int, vpp: int = 1) -> Timeline:
    return simulate(schedule, pp, vpp, micro_batches, [EVEN] * stages_of(schedule, pp, vpp))


def bubbles(found: Timeline) -> list[float]:
    return [found.seconds - busy for busy in found.busy]


@pytest.mark.parametrize(("pp", "micro_batches"), [*PAIRS, (4, 5), (8, 9), (3, 7), (5, 11)])
def test_1f1b(pp: int, micro_batches: int) -> None:
    """(PP - 1)(F + B) of bubble; PP - rank activations (arXiv 2104.04473, section 2.2)."""
    found = run("1f1b", pp, micro_batches)
    assert bubbles(found) == pytest.approx([(pp - 1) * (F + B)] * pp)
    assert found.in_flight == tuple(min(micro_batches, pp - rank) for rank in range(pp))


@pytest.mark.parametrize("vpp", [2, 4])
@pytest.mark.parametrize(("pp", "micro_batches"), PAIRS)
def test_interleaved(pp: int, micro_batches: int, vpp: int) -> None:
    """1F1B's bubble over VPP, counted in passes of a rank's whole share (section 2.2.2); activations as in Megatron."""
    found = run("interleaved", pp, micro_batches, vpp)
    assert bubbles(found) == pytest.approx([(pp - 1) * (F + B)] * pp)  # F, B of one of vpp chunks
    expected = [min(micro_batches * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp + 1) for rank in range(pp)]
    assert list(found.in_flight) == expected


@pytest.mark.parametrize(("pp", "micro_batches"), PAIRS)
def test_zb1p(pp: int, micro_batches: int) -> None:
    """(PP - 1)(F + B - 2W) (arXiv 2412.19437, table 2), for 1F1B's activations."""
    found = run("zb1p", pp, micro_batches)
    assert max(bubbles(found)) == pytest.approx((pp - 1) * (F + B - 2 * W))
    assert max(found.in_flight) == pp


# The published form takes a forward pass to be as long as the backward pass of inputs.
LEVEL = StageTime(F, F + W, W, overlapped=0.9)
DUAL = 0.9 * (2 * F + W) + (F + W) - 3 * W  # F&B + B - 3W


@pytest.mark.parametrize(("pp", "micro_batches"), PAIRS)
def test_dualpipe(pp: int, micro_batches: int) -> None:
    """(PP/2 - 1)(F&B + B - 3W) of bubble, PP + 1 activations (arXiv 2412.19437, table 2)."""
    found = simulate("dualpipe", pp, 1, micro_batches, [LEVEL] * pp)
    assert max(bubbles(found)) == pytest.approx((pp / 2 - 1) * DUAL)
    assert max(found.in_flight) == pp + 1


@pytest.mark.parametrize(("pp", "micro_batches"), PAIRS)
def test_dualpipev(pp: int, micro_batches: int) -> None:
    """DualPipe's bubble as of twice as many ranks, with stages of half the size."""
    found = simulate("dualpipev", pp, 1, micro_batches, [LEVEL] * 2 * pp)
    assert max(bubbles(found)) == pytest.approx((pp - 1) * DUAL)
    assert max(found.in_flight) == 2 * pp + 1


@pytest.mark.parametrize(
    ("schedule", "vpp"), [("1f1b", 1), ("interleaved", 2), ("zb1p", 1), ("dualpipe", 1), ("dualpipev", 1)]
)
def test_every_pass_runs_once(schedule: str, vpp: int) -> None:
    """F, B (or I and W) of each micro-batch on each stage, and no rank runs two at once."""
    pp, micro_batches = 4, 12
    found = run(schedule, pp, micro_batches, vpp)
    parts = [part for event in found.events for part in _parts(event.item)]
    stages = stages_of(schedule, pp, vpp)
    assert len(parts) == len(set(parts))
    for kind in "FIW":
        numbers = {(stage, number) for k, stage, number in parts if k == kind}
        assert numbers == {(stage, number) for stage in range(stages) for number in range(micro_batches)}
    for rank in range(pp):
        own = [event for event in found.events if event.rank == rank]
        assert all(one.end <= two.start + 1e-12 for one, two in pairwise(own))


def _parts(item: Pass) -> list[tuple[str, int, int]]:
    if item.kind == "FB":
        return [("F", *item[1:3]), ("I", *item[3:5]), ("W", *item[3:5])]
    return [(kind, *item[1:3]) for kind in ("IW" if item.kind == "B" else item.kind)]


@pytest.mark.parametrize(
    ("schedule", "vpp", "micro_batches"),
    [("1f1b", 1, 64), ("1f1b", 1, 65), ("1f1b", 1, 67), ("interleaved", 3, 64), ("zb1p", 1, 65), ("dualpipe", 1, 64),
     ("dualpipe", 1, 66), ("dualpipev", 1, 70)],
)  # fmt: skip
def test_a_long_step_is_extended_exactly(schedule: str, vpp: int, micro_batches: int) -> None:
    """Uneven stages and messages too: what is multiplied equals what is simulated, with any rest of micro-batches."""
    pp, stages = 4, stages_of(schedule, 4, vpp)
    times = [StageTime(1 + 0.1 * (s % 3), 2 + 0.3 * (s % 2), 0.8, 0.9) for s in range(stages)]
    whole, extended = (f(schedule, pp, vpp, micro_batches, times, 0.05) for f in (simulate, step_time))
    assert not extended.events
    assert extended.seconds == pytest.approx(whole.seconds)
    assert extended.busy == pytest.approx(whole.busy)
    assert extended.in_flight == whole.in_flight


ESTIMATES = {
    ("1f1b", 1): 3 * (F + F + W), ("interleaved", 2): 3 * (F + F + W), ("zb1p", 1): 3 * (F + F + W - 2 * W),
    ("dualpipe", 1): 1 * DUAL, ("dualpipev", 1): 3 * DUAL,
}  # fmt: skip


@pytest.mark.parametrize(("schedule", "vpp"), ESTIMATES)
def test_an_estimate_is_the_published_form(schedule: str, vpp: int) -> None:
    """The work of a rank, the bubble of 4 ranks (arXiv 2412.19437, table 2), and a message to the last rank and back.

    DualPipe's pairs take 0.9 of their two passes; each of its ranks holds two stages, for half of the micro-batches.
    """
    found = estimated(schedule, 4, vpp, 16, [LEVEL] * stages_of(schedule, 4, vpp), send=0.01)
    passes = 2 * F + W
    work = {"interleaved": 32 * passes, "dualpipe": 16 * 0.9 * passes, "dualpipev": 32 * 0.9 * passes}
    expected = work.get(schedule, 16 * passes) + ESTIMATES[schedule, vpp] + 2 * 3 * 0.01
    assert found.seconds == pytest.approx(expected)


def test_an_estimate_has_no_bubble_where_weight_gradients_fill_it() -> None:
    """F + B - 2 W is -0.5 (B with its weight gradients): the 16 micro-batches of the slowest rank alone are left."""
    found = estimated("zb1p", 4, 1, 16, [StageTime(1.0, 2.5, 2.0)] * 4)
    assert found.seconds == pytest.approx(16 * 3.5)


def test_one_rank_has_no_bubble() -> None:
    found = run("1f1b", 1, 8)
    assert found.bubble == pytest.approx(0.0, abs=1e-12)
    assert found.bubble_fraction == pytest.approx(0.0, abs=1e-12)


def test_the_bubble_is_the_mean_wait_of_the_ranks() -> None:
    """On 4 ranks each waits 3 (F + B), of a step with 8 (F + B) of work."""
    found = run("1f1b", 4, 8)
    assert found.bubble == pytest.approx(3 * (F + B))
    assert found.bubble_fraction == pytest.approx(3 / 11)


def test_the_slowest_stage_sets_the_pace() -> None:
    """One stage twice as long: each further micro-batch costs its time."""
    times = [EVEN, EVEN, StageTime(2 * F, 2 * B, 2 * W), EVEN]
    one, two = (simulate("1f1b", 4, 1, m, times).seconds for m in (16, 17))
    assert two - one == pytest.approx(2 * (F + B))


def test_messages_lengthen_the_fill_and_the_drain() -> None:
    assert simulate("1f1b", 4, 1, 1, [EVEN] * 4, send=0.25).seconds == pytest.approx(4 * (F + B) + 6 * 0.25)


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "reason"),
    [
        ("dualpipe", 6, "at least 8"),
        ("dualpipe", 9, "even"),
        ("interleaved", 6, "multiple of 4"),
        ("gpipe", 8, "unknown"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(schedule: str, micro_batches: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        order(schedule, 4, 2, 0, micro_batches)
