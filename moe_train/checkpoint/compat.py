"""Whether a run may continue a checkpoint: compares the checkpoint's config with the run's. No torch import."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moe_train.checkpoint.directory import CONFIG, damaged
from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config
from moe_train.config.walk import misfit
from parallel.errors import CheckpointError

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
    "seed": None,
    "data": (
        "name", "source", "path", "tokenizer", "dir", "blend", "split", "append_eod", "eod_token", "prepend_bos",
        "bos_token", "parse_special_tokens", "reset_at_eod",
    ),
    "train": ("seq_length",),
    "batch": ("global_batch_size",),
    "precision": (
        "dtype", "grad_reduce_fp32", "fp8", "fp8_format", "power_of_two_scales", "amax_history_len",
        "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "moments_dtype",
        "stochastic_rounding",
    ),
    "optimizer": None,
    "schedule": None,
}  # fmt: skip


def dump(cfg: Config) -> str:
    """The config as YAML text, as it stands in a checkpoint."""
    return yaml.safe_dump(asdict(cfg), sort_keys=False)


def read(directory: Path) -> dict[str, Any]:
    """The config of the run that wrote the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        config = yaml.safe_load((directory / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise damaged(directory, f"{CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise damaged(directory, f"{CONFIG} is no config of a run")
    return config


def model_of(directory: Path) -> ModelConfig:
    """The model of the run that wrote the checkpoint.

    Raises:
        CheckpointError: its config cannot be read, or is of a version with other fields.
    """
    values = read(directory)["model"]
    try:
        model = ModelConfig(**values)
    except TypeError as error:
        raise damaged(directory, f"{CONFIG} does not describe a model: {error}") from error
    for name, value in values.items():
        if why := misfit(f"model.{name}", value):
            raise damaged(directory, f"{CONFIG} has model.{name}={value}, which is {why}")
    return model


def check(saved: dict[str, Any], cfg: Config, directory: Path) -> list[str]:
    """Warnings, one line each, about settings that differ from the run that wrote the checkpoint.

    Raises:
        CheckpointError: the model differs.
    """
    now = asdict(cfg)
    model = _differences(saved["model"], now["model"], "model", None)
    wrong = [d for d in model if d[0] not in _LABELS | TUNABLE]
    if wrong:
        theirs = " ".join(f"{field}={_text(old)}" for _, field, old, _ in wrong)
        ours = " ".join(f"{field}={_text(new)}" for _, field, _, new in wrong)
        raise CheckpointError(
            f"checkpoint {directory} is of another model: {theirs} in the checkpoint, {ours} in the run",
            f"set {theirs}, or start another run with resume=never and another run_dir",
        )
    found = [d for d in model if d[0] in TUNABLE]
    for group, names in _TRAINING.items():
        found += _differences(saved.get(group), now[group], group, names)
    return [
        f"{field} was {_text(old)} when {directory.name} was saved and is {_text(new)} now"
        for _, field, old, new in found
    ]


def _differences(old: Any, new: Any, path: str, names: tuple[str, ...] | None) -> list[tuple[str, str, Any, Any]]:
    """(name, full name, old, new) of each differing field. A field that either side does not know is no difference."""
    if not isinstance(new, dict):
        return [(path, path, old, new)] if old is not None and old != new else []
    if not isinstance(old, dict):
        return []
    shared = [name for name in new if name in old and (names is None or name in names)]
    return [(name, f"{path}.{name}", old[name], new[name]) for name in shared if old[name] != new[name]]


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return "[" + ",".join(_text(item) for item in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
