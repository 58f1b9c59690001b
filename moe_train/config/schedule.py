"""Schedules: what changes with the progress of a run, and what reacts to its losses."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc
from moe_train.schedules import SHAPES


@dataclass
class ScheduleSegment:
    """A part of a schedule: an entry of the lists of `schedule`. Each begins where the one before ends."""

    shape: str = doc("constant", "How the value goes from its start to `value`.", choices=tuple(SHAPES))
    until_tokens: int | None = doc(
        None, "End, in training tokens since the start of the run; null for all three ends means the end of the run.",
        minimum=0,
    )  # fmt: skip
    until_steps: int | None = doc(None, "End, in steps since the start of the run.", minimum=0)
    until_fraction: float | None = doc(None, "End, as a fraction of the run's tokens.", minimum=0, maximum=1)
    value: float | None = doc(
        None, "Value at the end; null means `ratio`. Of inverse_sqrt and power the smallest value.", minimum=0
    )
    ratio: float | None = doc(
        None, "Value at the end, as a multiple of the configured value, such as optimizer.lr; null means the value at "
        "the start for constant; for other shapes schedule.min_lr_ratio in lr, 1 in batch_size, else 0.", minimum=0,
    )  # fmt: skip
    start: float | None = doc(
        None, "Value at the start; null means that at the end of the segment before, or the configured value.",
        minimum=0,
    )  # fmt: skip
    exponent: float | None = doc(None, "power: below 0, null means -0.51. polynomial: above 0, null means 1.")


@dataclass
class ScheduleConfig:
    """Learning rate and other values over a run, and what reacts to its losses."""

    decay: str = doc("cosine", "Shape after warm-up, where `lr` is empty.", choices=("cosine", "linear", "constant"))
    warmup_steps: int = doc(
        20, "Steps of linear warm-up from 0; where nothing sets it, a tenth of a run of fewer than 20 steps.", minimum=0
    )
    decay_steps: int | None = doc(None, "Step at which the decay ends; null means the last step.", minimum=1)
    min_lr_ratio: float = doc(0.1, "Final learning rate, as a fraction of the peak.", minimum=0)
    lr: list[ScheduleSegment] = doc(
        [], "Learning rate after warm-up, instead of `decay`.", example="[{until_fraction:0.8},{shape:1-sqrt,ratio:0}]"
    )
    weight_decay: list[ScheduleSegment] = doc(
        [], "Weight decay by progress; empty means optimizer.weight_decay.", example="[{shape:linear,value:0.2}]"
    )
    batch_size: list[ScheduleSegment] = doc(
        [], "Global batch size by tokens, which ends with batch.global_batch_size; empty means that.",
        example="[{shape:linear,start:8,until_tokens:1M,value:32},{}]",
    )  # fmt: skip
    batch_size_multiple: int | None = doc(
        None, "Batch sizes are rounded down to multiples of it; null means the greatest common divisor of the sizes "
        "that batch_size names.", minimum=1,
    )  # fmt: skip
    mtp_loss_coeff: list[ScheduleSegment] = doc(
        [], "Weight of the multi-token-prediction loss by progress; empty means model.mtp_loss_coeff.",
        example="[{until_tokens:10T},{value:0.1}]",
    )  # fmt: skip
    router_bias_update_rate: list[ScheduleSegment] = doc(
        [], "Update of the expert bias by progress; empty means model.router_bias_update_rate.",
        example="[{until_tokens:14.3T},{value:0}]",
    )  # fmt: skip
    balance_loss_scale: list[ScheduleSegment] = doc(
        [], "Factor on model.balance_loss_coeffs by progress; empty means 1.",
        example="[{until_steps:1000,value:10},{value:1}]",
    )  # fmt: skip
    plateau_patience: int | None = doc(
        None, "Reduce the learning rate after more than so many evaluations in a row without a better validation "
        "loss; null means never.", minimum=0,
    )  # fmt: skip
    plateau_factor: float = doc(0.5, "Factor of a reduction.", minimum=0)
    plateau_threshold: float = doc(1e-4, "A loss is better when lower by this fraction of the best.", minimum=0)
    plateau_cooldown: int = doc(0, "Evaluations after a reduction that are not counted.", minimum=0)
    plateau_max_reductions: int = doc(5, "Most reductions in a run.", minimum=0)
    rewarm_steps: int | None = doc(
        None, "Steps of linear re-warming from rewarm_factor after a bad step or a rollback; null means none.",
        minimum=0,
    )  # fmt: skip
    rewarm_factor: float = doc(0.1, "Factor on the learning rate at the start of re-warming.", minimum=0)
    rewarm_cooldown_steps: int = doc(0, "Steps at rewarm_factor before re-warming begins.", minimum=0)
    rewarm_max: int = doc(5, "Most times that a run cools down and re-warms.", minimum=0)
    on_resume: str = doc(
        "match", "A schedule that differs from the checkpoint's: reject it (match), use the checkpoint's, like "
        "Megatron-LM's --use-checkpoint-opt-param-scheduler (checkpoint), or use this run's, like "
        "--override-opt-param-scheduler (override).", choices=("match", "checkpoint", "override"),
    )  # fmt: skip
