"""Values on parameter groups: Megatron-Core's shapes, segments, multipliers of groups, the factor of reactions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_train.config.resolve import progress_of
from moe_train.config.schedule import ScheduleSegment
from moe_train.config.schema import Config
from moe_train.optim.scheduling import ScheduledParamScheduler, build_schedule


def built(cfg: Config) -> tuple[ScheduledParamScheduler, list[dict[str, Any]]]:
    """A scheduler of two groups, of which the second has half the peak and no weight decay."""
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "max_lr": cfg.optimizer.lr / 2, "wd_mult": 0.0}]
    return build_schedule(cfg, cast(Any, SimpleNamespace(param_groups=groups)), progress_of(cfg)), groups


def test_segments_reach_every_group() -> None:
    cfg = Config()
    cfg.train.steps, cfg.schedule.warmup_steps = 10, 2
    cfg.schedule.lr = [ScheduleSegment("linear", value=0.0)]
    cfg.schedule.weight_decay = [ScheduleSegment("linear", start=0.0, value=0.5)]
    scheduler, groups = built(cfg)
    for step in range(10):
        found = scheduler.set_progress(1024 * step, factor=0.5)
        rate = cfg.optimizer.lr * (step / 2 if step < 2 else (10 - step) / 8)
        assert [group["lr"] for group in groups] == pytest.approx([rate / 2, rate / 4])
        assert [group["weight_decay"] for group in groups] == pytest.approx([0.05 * step, 0])
        assert found == pytest.approx({"weight_decay": 0.05 * step})


def test_the_factor_multiplies_megatron_cores_shapes_too() -> None:
    cfg = Config()
    cfg.train.steps, cfg.schedule.warmup_steps = 10, 2
    scheduler, groups = built(cfg)
    for _ in range(6):
        assert scheduler.set_progress(0, factor=1.0) == {}
        rates = [group["lr"] for group in groups]
        scheduler.set_progress(0, factor=0.25)
        assert [group["lr"] for group in groups] == [rate * 0.25 for rate in rates]
        assert [group["weight_decay"] for group in groups] == [cfg.optimizer.weight_decay, 0]
        scheduler.step(increment=1)
    assert rates[0] > 0
