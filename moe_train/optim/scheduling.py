"""Sets the values that follow a schedule, once before each step: on parameter groups and on the model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.config.quantities import LR, RunProgress, is_scheduled, schedule_of
from moe_train.config.resolve import decay_end
from moe_train.config.schema import Config
from moe_train.schedules import Schedule

WEIGHT_DECAY = "weight_decay"
OF_THE_MODEL = ("mtp_loss_coeff", "router_bias_update_rate", "balance_loss_scale")


class ScheduledParamScheduler(OptimizerParamScheduler):
    """Megatron-Core's scheduler, in which segments can replace its shapes.

    Its shapes are counted in optimizer updates (`num_steps`), segments in training tokens.

    Args:
        schedules: learning rate and weight decay by tokens, where the config has segments for them.
    """

    def __init__(self, *args: Any, schedules: Mapping[str, Schedule], **options: Any) -> None:
        self._schedules, self._tokens, self._factor = schedules, 0, 1.0
        super().__init__(*args, **options)

    def set_progress(self, tokens: int, factor: float) -> dict[str, float]:
        """Set the values of the step that begins after `tokens`, with the learning rate times `factor`. Returns the
        weight decay where it follows a schedule."""
        self._tokens, self._factor = tokens, factor
        self.step(increment=0)
        return {WEIGHT_DECAY: self.get_wd()} if WEIGHT_DECAY in self._schedules else {}

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of a parameter group. One with a peak of its own has it in proportion."""
        schedule = self._schedules.get(LR)
        if schedule is None:
            return float(super().get_lr(param_group)) * self._factor
        own = param_group.get("max_lr", self.max_lr)
        share = own / self.max_lr if own != self.max_lr else 1.0
        return schedule.value_at(self._tokens) * share * self._factor

    def get_wd(self, param_group: dict[str, Any] | None = None) -> float:
        """Weight decay of a parameter group, before its multiplier."""
        schedule = self._schedules.get(WEIGHT_DECAY)
        return float(super().get_wd(param_group)) if schedule is None else schedule.value_at(self._tokens)


def build_schedule(cfg: Config, optimizer: MegatronOptimizer, progress: RunProgress) -> ScheduledParamScheduler:
    """Warm-up from 0, then decay, counted in optimizer updates, or the segments of the config."""
    schedule, lr = cfg.schedule, cfg.optimizer.lr
    return ScheduledParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=lr * schedule.min_lr_ratio,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=max(decay_end(schedule, progress.steps), schedule.warmup_steps + 1),
        lr_decay_style=schedule.decay,
        start_wd=cfg.optimizer.weight_decay,
        end_wd=cfg.optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False,
        schedules={
            name: schedule_of(cfg, name, progress) for name in (LR, WEIGHT_DECAY) if is_scheduled(cfg, name)
        },
    )  # fmt: skip


class ModelSchedules:
    """Coefficients of losses and the update of expert biases, which Megatron-Core reads from the model's config.

    Args:
        chunks: of `data_parallel`. Each can have a config of its own, and so can its layers.
    """

    def __init__(self, cfg: Config, chunks: list[Any], progress: RunProgress) -> None:
        self._schedules = {name: schedule_of(cfg, name, progress) for name in OF_THE_MODEL if is_scheduled(cfg, name)}
        found = (getattr(module, "config", None) for chunk in chunks for module in chunk.modules())
        configs = {id(config): config for config in found if isinstance(config, TransformerConfig)}
        self._configs = [(config, config.moe_aux_loss_coeff) for config in configs.values()] if self._schedules else []

    def set_progress(self, tokens: int) -> dict[str, float]:
        """Set the values of the step that begins after `tokens`. Returns those that follow a schedule."""
        values = {name: schedule.value_at(tokens) for name, schedule in self._schedules.items()}
        for config, coefficients in self._configs:
            if "mtp_loss_coeff" in values:
                config.mtp_loss_scaling_factor = values["mtp_loss_coeff"]
            if "router_bias_update_rate" in values:
                config.moe_router_bias_update_rate = values["router_bias_update_rate"]
            if "balance_loss_scale" in values:
                config.moe_aux_loss_coeff = [values["balance_loss_scale"] * coefficient for coefficient in coefficients]
        return values
