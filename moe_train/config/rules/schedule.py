"""Rules of schedules: segments without gaps, batch sizes that end where the config says, reactions that can happen."""

from __future__ import annotations

from dataclasses import replace

from moe_train.config.quantities import BATCH, CONFIGURED, LR, is_scheduled, name_of, schedule_of
from moe_train.config.resolve import ResolvedConfig, Rule, progress_of
from moe_train.config.schedule import ScheduleSegment
from moe_train.config.schema import Config
from parallel.suggest import Impossible, override_value


def segments(facts: ResolvedConfig) -> None:
    """Segments follow one another, and the last one lasts until the run ends."""
    cfg = facts.cfg
    if not any(is_scheduled(cfg, quantity) for quantity in CONFIGURED):
        return
    steps = progress_of(cfg)
    for quantity in CONFIGURED:
        if not is_scheduled(cfg, quantity):
            continue
        end, entries = schedule_of(cfg, quantity, steps).end, getattr(cfg.schedule, quantity)
        if facts.trains and end <= steps.tokens_after(steps.steps - 1):
            fitting = [[*entries, ScheduleSegment()]]
            if quantity != BATCH:
                last = replace(entries[-1], until_tokens=None, until_steps=None, until_fraction=None)
                fitting.append([*entries[:-1], last])
            raise Impossible(
                f"{name_of(quantity, len(entries) - 1)} ends at {end:,} tokens, but the run has {steps.run_tokens:,}, "
                "and no segment follows", [{f"schedule.{quantity}": entries} for entries in fitting],
            )  # fmt: skip


def last_batch_size(facts: ResolvedConfig) -> None:
    """The ramp ends with the global batch size, for which memory and speed are predicted."""
    cfg = facts.cfg
    if not is_scheduled(cfg, BATCH):
        return
    last, size = progress_of(cfg).batches.last_size, cfg.batch.global_batch_size
    if last != size:
        raise Impossible(
            f"schedule.batch_size ends with {last} sequences, but batch.global_batch_size={size}",
            [{"batch.global_batch_size": last}, {"schedule.batch_size": []}],
        )


def targets(facts: ResolvedConfig) -> None:
    """What follows a schedule exists in the model."""
    model = facts.cfg.model
    needed = {
        "mtp_loss_coeff": (model.mtp_num_layers > 0, "model.mtp_num_layers=0"),
        "router_bias_update_rate": (model.is_moe and model.router_bias, "model.router_bias=false"),
        "balance_loss_scale": (bool(model.balance_losses), "model.balance_losses=[]"),
    }
    for quantity, (present, without) in needed.items():
        if is_scheduled(facts.cfg, quantity) and not present:
            shown = override_value(getattr(facts.cfg.schedule, quantity))
            raise Impossible(
                f"schedule.{quantity}={shown} has no effect with {without}", [{f"schedule.{quantity}": []}]
            )


def short_form(facts: ResolvedConfig) -> None:
    """A learning rate in segments has no shape of the short form."""
    schedule = facts.cfg.schedule
    if not is_scheduled(facts.cfg, LR):
        return
    usual = type(schedule)()
    for name in ("decay", "decay_steps"):
        value = getattr(schedule, name)
        if value != getattr(usual, name):
            raise Impossible(
                f"schedule.{name}={value} has no effect with the segments of schedule.lr",
                [{f"schedule.{name}": getattr(usual, name)}, {"schedule.lr": []}],
            )


def reactions(facts: ResolvedConfig) -> None:
    """A reaction has evaluations to react to, and lowers the learning rate."""
    cfg: Config = facts.cfg
    schedule = cfg.schedule
    if schedule.plateau_patience is not None and not cfg.train.eval_batches:
        raise Impossible(
            f"schedule.plateau_patience={schedule.plateau_patience} needs evaluations, but train.eval_batches=0",
            [{"train.eval_batches": 4}, {"schedule.plateau_patience": None}],
        )
    for name, usual in (("plateau_factor", 0.5), ("rewarm_factor", 0.1)):
        value = getattr(schedule, name)
        if value >= 1:
            raise Impossible(
                f"schedule.{name}={value} does not lower the learning rate: it is not below 1",
                [{f"schedule.{name}": usual}],
            )


RULES: tuple[Rule, ...] = (short_form, segments, last_batch_size, targets, reactions)
