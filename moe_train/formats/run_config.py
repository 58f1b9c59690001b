"""Whether a run may continue a checkpoint: compares the checkpoint's config with the run's. No torch import."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from moe_train.config import former
from moe_train.config.learning_rate import rate_of
from moe_train.config.model import ModelConfig
from moe_train.config.optimizer import ADAMW, OptimizerConfig, ParameterGroup
from moe_train.config.quantities import LR, fixed_ends, is_scheduled
from moe_train.config.resolve import decay_end, follows_length, progress_of, total_steps
from moe_train.config.schema import Config
from moe_train.config.walk import get, typed, violation, with_values
from moe_train.files import untrusted
from moe_train.formats.run_directory import CONFIG, damaged
from parallel.errors import CheckpointError
from parallel.suggest import override, override_value

# Model fields that say nothing about weights that exist.
_LABELS = {"name", "family", "init_std"}
# Model fields that papers change while training: losses, their weights, dropping of tokens, context extension.
TUNABLE = {
    "balance_losses", "balance_loss_coeffs", "z_loss_coeff", "mtp_loss_coeff", "router_bias_update_rate",
    "router_dtype", "capacity_factor", "pad_to_capacity", "token_drop_policy", "max_position_embeddings", "rope_type",
    "rope_base", "yarn_factor", "yarn_original_max_position", "yarn_beta_fast", "yarn_beta_slow", "yarn_mscale",
    "yarn_mscale_all_dim", "llama3_factor",
}  # fmt: skip
# What else changes the numbers of a continued run, so that it is no longer the run that was interrupted.
_TRAINING = {
    "batch": ("global_batch_size",),
    "precision": (
        "dtype", "grad_reduce_fp32", "fp8", "fp8_format", "power_of_two_scales", "amax_history_len",
        "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "moments_dtype",
        "stochastic_rounding",
    ),
    "optimizer": None,
    "schedule": (
        "decay", "warmup_steps", "decay_steps", "min_lr_ratio", "lr", "weight_decay", "batch_size",
        "batch_size_multiple", "mtp_loss_coeff", "router_bias_update_rate", "balance_loss_scale", "plateau_patience",
        "plateau_factor", "plateau_threshold", "plateau_cooldown", "plateau_max_reductions", "rewarm_steps",
        "rewarm_factor", "rewarm_cooldown_steps", "rewarm_max",
    ),
    "objective": None,
}  # fmt: skip
# What of `data` does not change what a run reads, or in which order.
_FREE_OF_DATA = {
    "data.name", "data.verify", "data.cache_dir", "data.prepare_workers", "data.loader_workers", "data.on_resume",
}  # fmt: skip
_RATE = ("optimizer.lr", "schedule.decay", "schedule.warmup_steps", "schedule.min_lr_ratio", "schedule.lr")


@dataclass(frozen=True)
class Position:
    """How far a checkpoint is."""

    step: int
    tokens: int
    schedule_steps: int
    """Position of the learning-rate schedule; behind `step` where fp16 or a bad step skipped updates."""


def dump(cfg: Config) -> str:
    """The config as YAML text, as a checkpoint stores it."""
    return yaml.safe_dump(asdict(cfg), sort_keys=False)


def read(directory: Path) -> dict[str, Any]:
    """The config of the run that wrote the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        config = untrusted.read_yaml(directory / CONFIG)
    except (OSError, ValueError) as error:
        raise damaged(directory, f"{CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise damaged(directory, f"{CONFIG} is not the config of a run")
    return former.current(config)


def model_of(directory: Path, any_version: bool = False) -> ModelConfig:
    """The model of the run that wrote the checkpoint.

    Args:
        any_version: whether fields that this version does not know are left out.

    Raises:
        CheckpointError: its config cannot be read, or is of a version with other fields.
    """
    values = read(directory)["model"]
    if any_version:
        known = {field.name for field in fields(ModelConfig)}
        values = {name: value for name, value in values.items() if name in known}
    try:
        model = ModelConfig(**values)
    except TypeError as error:
        raise damaged(directory, f"{CONFIG} does not describe a model: {error}") from error
    for name, value in values.items():
        if why := violation(f"model.{name}", value):
            raise damaged(directory, f"{CONFIG} has model.{name}={value}, which is {why}")
    return model


def optimizer_of(directory: Path) -> OptimizerConfig:
    """The optimizer of the run that wrote the checkpoint. Options that its version did not have get their defaults.

    Raises:
        CheckpointError: its config cannot be read.
    """
    saved = read(directory).get("optimizer")
    known = {field.name for field in fields(OptimizerConfig)}
    values = {name: value for name, value in saved.items() if name in known} if isinstance(saved, dict) else {}
    for name, value in values.items():
        if why := violation(f"optimizer.{name}", value):
            raise damaged(directory, f"{CONFIG} has optimizer.{name}={value}, which is {why}")
    entries = values.pop("groups", [])
    try:
        groups = [ParameterGroup(**entry) for entry in entries]
    except TypeError as error:
        raise damaged(directory, f"{CONFIG} has optimizer.groups={entries}: {error}") from error
    return OptimizerConfig(**values, groups=groups)


def check(saved: dict[str, Any], cfg: Config, directory: Path) -> list[str]:
    """Warnings, one line each, about settings that differ from the run that wrote the checkpoint.

    Raises:
        CheckpointError: the model or the optimizer differs.
    """
    check_model(saved, cfg, directory)
    _check_optimizer(saved, cfg, directory)
    differing = [d for d in _differences(saved["model"], asdict(cfg.model), "model", None) if d[0] in TUNABLE]
    differing += _data_differences(saved, cfg)
    for group, names in _TRAINING.items():
        differing += _differences(saved.get(group), asdict(cfg)[group], group, names)
    return [
        f"{field} was {_text(old)} when {directory.name} was saved and is {_text(new)} now"
        for _, field, old, new in differing
    ]


def check_model(saved: dict[str, Any], cfg: Config, directory: Path) -> None:
    """Raise CheckpointError where the checkpoint is of another model."""
    model = _differences(saved["model"], asdict(cfg.model), "model", None)
    wrong = [d for d in model if d[0] not in _LABELS | TUNABLE]
    if wrong:
        theirs = " ".join(f"{field}={_text(old)}" for _, field, old, _ in wrong)
        ours = " ".join(f"{field}={_text(new)}" for _, field, _, new in wrong)
        raise CheckpointError(
            f"checkpoint {directory} is of another model: {theirs} in the checkpoint, {ours} in the run",
            f"set {theirs}, or start another run with another run_dir",
        )


def _check_optimizer(saved: dict[str, Any], cfg: Config, directory: Path) -> None:
    """Raise CheckpointError where the checkpoint has the state of another optimizer."""
    options = saved.get("optimizer")
    before = options.get("name", ADAMW) if isinstance(options, dict) else ADAMW
    if before != cfg.optimizer.name:
        raise CheckpointError(
            f"checkpoint {directory} has the state of optimizer.name={before}, and the run has "
            f"optimizer.name={cfg.optimizer.name}",
            f"set optimizer.name={before}, or start another run with init_from={directory}",
        )


def check_data(saved: dict[str, Any], cfg: Config, directory: Path) -> None:
    """Raise CheckpointError where the run would read other data than it began with, and was not asked to."""
    if cfg.data.on_resume == "change":
        return
    if differing := _data_differences(saved, cfg):
        changes = ", ".join(f"{field} was {_text(old)} and is {_text(new)}" for _, field, old, new in differing)
        before = " ".join(override(field, typed(field, old)) for _, field, old, _ in differing)
        raise CheckpointError(
            f"the run would continue with other data than {directory}: {changes} now",
            f"use {before}, or add data.on_resume=change",
        )


def check_schedule(
    before: Config, cfg: Config, position: Position, set_by_user: Collection[str]
) -> Config:  # fmt: skip
    """`cfg` with the schedule with which it continues.

    The learning rate must not change because something else did: the end of the decay follows the length of the run,
    and an option of a group has values of its own.

    Args:
        before: the config of the checkpoint.
        set_by_user: fields that the command line sets by name.

    Raises:
        CheckpointError: the schedule changes, and nobody asked for that.
    """
    end_before, end = _end_of_decay(before, position), _end_of_decay(cfg, position)
    same_end = end == end_before or not (_has_end(before) or _has_end(cfg))
    if cfg.schedule.on_resume == "checkpoint":
        names = ("decay", "warmup_steps", "min_lr_ratio", "decay_steps", "lr")
        values = {f"schedule.{name}": getattr(before.schedule, name) for name in names}
        values["optimizer.lr"] = before.optimizer.lr
        if not same_end and is_scheduled(before, LR):
            values["schedule.lr"] = fixed_ends(before, LR, progress_of(before, position.step, position.tokens))
        elif not same_end:
            values["schedule.decay_steps"] = end_before[1]
        return with_values(cfg, values)
    if cfg.schedule.on_resume == "override":
        return cfg
    changed = [name for name in _RATE if get(cfg, name) != get(before, name) and name not in set_by_user]
    changes = [f"{name} from {_text(get(before, name))} to {_text(get(cfg, name))}" for name in changed]
    if not same_end and cfg.schedule.decay_steps is None:
        was, now = (f"{unit} {number}" for unit, number in (end_before, end))
        changes.append(f"the end of its decay from {was} to {now.removeprefix('step ')}")
    if not changes:
        return cfg
    rates = [
        rate_of(config, progress_of(config, position.step, position.tokens), position.tokens, position.schedule_steps)
        for config in (before, cfg)
    ]
    raise CheckpointError(
        f"the run would continue with another learning rate, {rates[1]:.3g} instead of {rates[0]:.3g} at step "
        f"{position.step}: this command changes {' and '.join(changes)}",
        "add schedule.on_resume=checkpoint to keep the schedule of the checkpoint, or schedule.on_resume=override to "
        "take the new one",
    )


def _has_end(cfg: Config) -> bool:
    """Whether the learning rate depends on where its decay ends."""
    return follows_length(cfg) or not (is_scheduled(cfg, LR) or cfg.schedule.decay == "constant")


def _end_of_decay(cfg: Config, position: Position) -> tuple[str, int]:
    """Where the decay of the learning rate ends: the token, for segments, or the step."""
    if is_scheduled(cfg, LR):
        return "token", progress_of(cfg, position.step, position.tokens).run_tokens
    return "step", decay_end(cfg.schedule, total_steps(cfg, position.step, position.tokens))


Difference = tuple[str, str, Any, Any]
"""Name, full name, old and new value of a field."""


def _data_differences(saved: dict[str, Any], cfg: Config) -> list[Difference]:
    """What differs in what the run reads, and in which order."""
    now, differing = asdict(cfg), []
    for group, names in (("seed", None), ("data", None), ("train", ("seq_length",))):
        differing += _differences(saved.get(group), now[group], group, names)
    return [difference for difference in differing if difference[1] not in _FREE_OF_DATA]


def _differences(old: Any, new: Any, path: str, names: tuple[str, ...] | None) -> list[Difference]:
    """Each differing field. Fields that either side does not know are left out."""
    if not isinstance(new, dict):
        return [(path, path, old, new)] if old is not None and old != new else []
    if not isinstance(old, dict):
        return []
    shared = [name for name in new if name in old and (names is None or name in names)]
    return [(name, f"{path}.{name}", old[name], new[name]) for name in shared if old[name] != new[name]]


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, dict):
        return override_value({name: item for name, item in value.items() if item is not None})
    if isinstance(value, list):
        return "[" + ",".join(_text(item) for item in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
