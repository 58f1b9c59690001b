"""Our learning rate of a step is that of Megatron-Core's scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_train.config.learning_rate import learning_rate
from moe_train.config.resolve import progress_of
from moe_train.config.schema import Config
from moe_train.optim.scheduling import build_schedule


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "end"), [(0, 10), (4, 10), (10, 10), (0, None)])
def test_it_is_megatron_cores(decay: str, warmup: int, end: int | None) -> None:
    cfg = Config()
    cfg.schedule.decay, cfg.schedule.warmup_steps, cfg.schedule.decay_steps = decay, warmup, end
    optimizer = SimpleNamespace(param_groups=[{"params": []}])
    cfg.train.steps = 15
    schedule = build_schedule(cfg, cast(Any, optimizer), progress_of(cfg))
    for updates in range(20):
        expected = optimizer.param_groups[0]["lr"]
        found = learning_rate(cfg.optimizer, cfg.schedule, end or 15, updates)
        assert found == pytest.approx(expected, rel=1e-12), updates
        schedule.step(increment=1)
