"""The global batch size as a function of progress: by hand, and in runs whose batches grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from moe_train import run as run_module
from moe_train import train
from moe_train.config import resolve
from moe_train.config.schema import Config
from moe_train.loop import step
from moe_train.schedules import BatchSchedule, BatchSegment
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


class Texts(Dataset[Any]):
    """As many samples of random tokens as a run asks for."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = torch.randint(0, small_run.VOCABULARY, (17,), generator=torch.Generator().manual_seed(index))
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(16), "position_ids": torch.arange(16)}


def grown(degrees: small_run.Degrees) -> list[dict[str, Any]]:
    """Metrics and progress after each step of a run whose batches grow."""
    run_module.batch_schedule = lambda cfg: RAMP
    run = small_run.prepare(small_run.config(Path("unused"), degrees))
    run.total_steps = len(SIZES)
    assert train.samples_of(run) == sum(SIZES)
    reader = train.train_reader(run, Texts(), 0)
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
