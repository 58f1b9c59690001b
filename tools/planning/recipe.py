"""Stages of a whole training, from `plan.recipe`: pre-training, context extension, post-training."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.numbers import as_integer
from moe_train.config.plan import TrainingStage
from parallel.errors import ConfigError
from parallel.suggest import override_value


def count(text: str, field: str = "", thousand: int = 1000) -> int:
    """A number such as 14.8T, 1_000 or 4e9, of a field; `thousand` is what k multiplies by.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = as_integer(text, thousand)
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(
            f"{field}{'=' if field else ''}{text!r} is not a whole number above 0",
            "write it as 14.8T, 500B, 2048 or 4e9",
        )
    return number


def stages(recipe: Sequence[TrainingStage], tokens: int | None) -> list[TrainingStage]:
    """The stages of a training; without a recipe one of `tokens`, and none without those.

    Raises:
        ConfigError: a stage has not just one of tokens, steps and GPU-hours; or no stage has the tokens that were asked
            for.
    """
    if not recipe:
        return [TrainingStage(tokens=tokens)] if tokens else []
    for stage in recipe:
        lengths = [name for name in ("tokens", "steps", "gpu_hours") if getattr(stage, name) is not None]
        if len(lengths) != 1:
            given = " and ".join(lengths) if lengths else "no tokens, steps or gpu_hours"
            raise ConfigError(f"plan.recipe: {override_value(stage)} has {given}", "write {name:NAME,tokens:14.8T}")
    if tokens and not any(stage.tokens and abs(stage.tokens / tokens - 1) < 1e-3 for stage in recipe):
        raise ConfigError(f"train.tokens={tokens} is of no stage of plan.recipe", "change the recipe, or leave it out")
    return list(recipe)
