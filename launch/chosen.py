"""Defaults that suit a laptop, where a large model is about to train with them. No torch import."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.assumed import names_of
from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.schema import Config
from moe_train.config.walk import get
from moe_train.model.arithmetic import count_parameters
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.suggest import override_value

LARGE = 1e9  # parameters, from which a run on GPUs is not a small experiment
# What must be chosen, with the groups that may have done so.
_FIELDS = ("train.seq_length", "optimizer.lr", "batch.global_batch_size", "precision.dtype", "data.source")
_DEFAULTS = Config()


def check(cfg: Config, layout: ParallelLayout, overrides: Sequence[str]) -> None:
    """Refuse a large model on GPUs with a field that still has the default for a laptop, and that nobody named.

    Raises:
        ConfigError: with all such fields, and the recipe of the model.
    """
    if cfg.runtime != "cuda" or count_parameters(cfg.model).total < LARGE:
        return
    given = names_of(overrides)
    unscaled = [
        name
        for name in _FIELDS
        if get(cfg, name) == get(_DEFAULTS, name) and not given & {name, name.partition(".")[0]}
    ]
    if cfg.train.steps is None and cfg.train.tokens is None:
        unscaled.append("train.tokens")
    if not unscaled:
        return
    shown = ", ".join(f"{name}={override_value(get(cfg, name))}" for name in unscaled)
    recipe = CONF_DIR / "experiment" / cfg.model.name / "pretrain.yaml"
    remedy = f"use experiment={cfg.model.name}/pretrain, or give each of them" if recipe.exists() else "give each"
    raise ConfigError(
        f"{cfg.model.name} on {layout.world_size:,} GPUs would train with defaults for a laptop: {shown}", remedy
    )
