"""The global batch size as a function of progress: by hand, and in runs whose batches grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train import run as run_module
from moe_train import train
from moe_train.config import resolve
from moe_train.config.schema import Config
from moe_train.loop import step
from moe_train.schedules import SHAPES, BatchSchedule, BatchSegment, Schedule, Span
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

RAMP = BatchSchedule([BatchSegment(0, 2), BatchSegment(4, 4), BatchSegment(12, 8)])
SIZES = [2, 2, 4, 4, 8, 8]


def test_the_size_at_each_sample() -> None:
    assert RAMP.sizes == (2, 4, 8)
    assert RAMP.last_size == 8
    assert [RAMP.size_at(sample) for sample in (0, 3, 4, 11, 12, 1000)] == [2, 2, 4, 4, 8, 8]
    constant = BatchSchedule.constant(6)
    assert [constant.size_at(sample) for sample in (0, 1, 10**12)] == [6, 6, 6]


def test_samples_and_steps_are_inverse_and_as_counted_one_by_one() -> None:
    for schedule in (RAMP, BatchSchedule.constant(3)):
        for start in range(20):  # also from the middle of a batch, where a run resumed with other sizes
            trained = start
            for steps in range(12):
                assert schedule.samples_after(start, steps) == trained
                assert schedule.steps_for(start, trained - start) == steps
                assert schedule.steps_for(start, trained - start + 1) == steps + 1
                trained += schedule.size_at(trained)


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        ([], "begins at sample 0"),
        ([(1, 2)], "begins at sample 0"),
        ([(0, 2), (5, 4)], "5 samples from .* are not whole batches"),
        ([(0, 2), (4, 4), (4, 8)], "0 samples from"),
        ([(0, 2), (4, 4), (2, 8)], "-2 samples from"),
    ],
)
def test_segments_that_are_not_whole_batches_are_refused(segments: list[tuple[int, int]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BatchSchedule([BatchSegment(*segment) for segment in segments])


def test_a_constant_size_gives_the_steps_of_a_token_budget() -> None:
    cfg = Config()
    cfg.train.steps, cfg.train.seq_length, cfg.batch.global_batch_size = None, 16, 4
    for budget in (1, 63, 64, 65, 640):
        cfg.train.tokens = budget
        assert resolve.total_steps(cfg) == -(-budget // 64)
        assert resolve.total_steps(cfg, 3, 3 * 64) == 3 - (-max(0, budget - 192) // 64)
    assert resolve.total_steps(cfg, 5, 600, trained_samples=7) == 6


def grown(degrees: small_run.Degrees) -> list[dict[str, Any]]:
    """Metrics and progress after each step of a run whose batches grow."""
    run_module.batch_schedule = lambda cfg: RAMP
    run = small_run.prepare(small_run.config(Path("unused"), degrees))
    run.total_steps = len(SIZES)
    assert train.samples_of(run) == sum(SIZES)
    reader = train.train_reader(run, small_run.Samples(64), 0)
    batches = reader.for_chunks(run.layout.vpp)
    found = []
    for _ in SIZES:
        metrics = step.train_step(run, batches)
        assert reader.consumed_samples == run.state.consumed_samples
        own = {name: metrics[name] for name in ("lm_loss", "grad_norm", "mtp_loss", "seq_load_balancing_loss")}
        routed = sum(metrics["expert_load"][1])
        found.append({**own, "routed": routed, "trained": run.state.trained_samples, "size": run.last_batch_size})
    return found


def test_a_run_whose_batches_grow_is_the_same_in_every_layout() -> None:
    (alone,) = run_distributed(grown, 1, {})
    assert [line["size"] for line in alone] == SIZES
    assert [line["trained"] for line in alone] == [2, 4, 8, 12, 20, 28]
    # Each token takes two experts, so what a step routes shows how many samples it computed.
    assert [line["routed"] for line in alone] == [size * small_run.SEQUENCE * 2 for size in SIZES]
    for found in run_distributed(grown, 2, {"ep": 2}) + run_distributed(grown, 2, {"pp": 2, "vpp": 2}):
        for now, before in zip(found, alone, strict=True):
            assert now == pytest.approx(before, rel=2e-4)


BEGIN, END, FIRST, LAST = 1_000, 9_000, 3e-4, 2e-5
CURVES = {
    "constant": lambda t: LAST,
    "linear": lambda t: np.interp(t, [BEGIN, END], [FIRST, LAST]),
    "cosine": lambda t: LAST + (FIRST - LAST) * np.cos(np.pi / 2 * (t - BEGIN) / (END - BEGIN)) ** 2,
    "1-sqrt": lambda t: FIRST - (FIRST - LAST) * ((t - BEGIN) / (END - BEGIN)) ** 0.5,
    "exponential": lambda t: np.exp(np.interp(t, [BEGIN, END], np.log([FIRST, LAST]))),
    "polynomial": lambda t: LAST + (FIRST - LAST) * ((END - t) / (END - BEGIN)) ** 1.5,
    "inverse_sqrt": lambda t: np.maximum(FIRST / np.sqrt(t / BEGIN), LAST),
    "power": lambda t: np.maximum(FIRST * np.exp(-1.5 * np.log(t / BEGIN)), LAST),
}
EXPONENTS = {"polynomial": 1.5, "power": -1.5}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_as_computed_otherwise_at_1000_random_token_counts(shape: str) -> None:
    span = Span(shape, BEGIN, END, FIRST, LAST, EXPONENTS.get(shape, 0.0))
    schedule = Schedule((Span("linear", 0, BEGIN, 0.0, FIRST), span))
    tokens = np.random.default_rng(7).integers(0, 12_000, 1_000)
    bounded = np.clip(tokens, BEGIN, END)
    expected = np.where(tokens < BEGIN, FIRST * tokens / BEGIN, CURVES[shape](bounded))
    found = [schedule.value_at(int(one)) for one in tokens]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert schedule.value_at(BEGIN) == (LAST if shape == "constant" else FIRST)
    assert schedule.end == END


def test_a_schedule_without_an_end_has_its_last_value() -> None:
    assert [Schedule.constant(0.3).value_at(tokens) for tokens in (0, 1, 10**15)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize("bounds", [[], [(1, 2)], [(0, 2), (3, 4)], [(0, 2), (2, 2)]])
def test_spans_with_a_gap_are_refused(bounds: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="do not follow one another"):
        Schedule(tuple(Span("constant", begin, end, 1.0, 1.0) for begin, end in bounds))


def test_a_ramp_is_as_stepped_through_one_by_one() -> None:
    """Up, a plateau, down again: each step has the size of the tokens before it."""
    up = Span("linear", 0, 5_000, 8.0, 64.0)
    schedule = Schedule((up, Span("constant", 5_000, 7_000, 64.0, 64.0), Span("cosine", 7_000, 30_003, 64.0, 16.0)))
    ramp = BatchSchedule.from_schedule(schedule, seq_length=10, multiple=4)
    sample, sizes = 0, []
    while sample < 4_000:
        size = int(schedule.value_at(10 * sample) // 4) * 4
        assert ramp.size_at(sample) == size
        sizes.append(size)
        sample += size
    assert ramp.sizes[:3] == (8, 12, 16)
    assert max(sizes) == 64
    assert ramp.last_size == 16
    assert ramp.samples_after(0, len(sizes)) == sum(sizes)


def test_a_ramp_that_cannot_be_is_refused() -> None:
    rising = Schedule((Span("linear", 0, 10**13, 2.0, 10.0**6),))
    with pytest.raises(ValueError, match="2 sequences are fewer than 4"):
        BatchSchedule.from_schedule(rising, 1, 4)
    with pytest.raises(ValueError, match="more than 10,000 batch sizes"):
        BatchSchedule.from_schedule(rising, 1, 1)
