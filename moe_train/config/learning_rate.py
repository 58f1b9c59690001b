"""The learning rate of a step, without what it reacts to. No torch import."""

from __future__ import annotations

import math

from moe_train.config.optimizer import OptimizerConfig
from moe_train.config.quantities import LR, RunProgress, is_scheduled, schedule_of
from moe_train.config.resolve import decay_end
from moe_train.config.schedule import ScheduleConfig
from moe_train.config.schema import Config


def rate_of(cfg: Config, progress: RunProgress, tokens: int, updates: int) -> float:
    """Learning rate of the step that begins after `tokens`, and `updates` of the weights."""
    if is_scheduled(cfg, LR):
        return schedule_of(cfg, LR, progress).value_at(tokens)
    return learning_rate(cfg.optimizer, cfg.schedule, decay_end(cfg.schedule, progress.steps), updates)


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, decay_end: int, updates: int) -> float:
    """Learning rate of the update that follows `updates` others, in one of Megatron-Core's shapes.

    Source: megatron/core/optimizer_param_scheduler.py, `get_lr`.

    Args:
        decay_end: step at which the decay ends; `schedule.decay_steps`, or the last step of the run.
    """
    peak, warmup = optimizer.lr, schedule.warmup_steps
    if updates <= warmup and warmup:
        return peak * updates / warmup
    if schedule.decay == "constant":
        return peak
    least = peak * schedule.min_lr_ratio
    end = max(decay_end, warmup + 1)
    if updates > end:
        return least
    share = (updates - warmup) / (end - warmup)
    height = 1.0 - share if schedule.decay == "linear" else 0.5 * (math.cos(math.pi * share) + 1.0)
    return least + height * (peak - least)
