"""Stages of a whole training, from `plan.recipe`: pre-training, context extension, post-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.config.numbers import as_integer
from parallel.errors import ConfigError

FIELDS = ("tokens", "seq", "batch", "steps", "cp", "gpu_hours", "failures")


@dataclass(frozen=True)
class Stage:
    """One stage: so many tokens or steps, with other sequences and batch where given, or GPU-hours that are known."""

    name: str
    tokens: float | None = None
    seq: int | None = None
    batch: int | None = None
    steps: int | None = None
    cp: int | None = None
    gpu_hours: float | None = None
    with_failures: bool = False

    @property
    def as_planned(self) -> bool:
        """Whether it runs exactly as the plan."""
        return self.seq is None and self.batch is None and self.cp is None


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


def parse(recipe: Sequence[str], tokens: int | None) -> list[Stage]:
    """The stages; without a recipe one of `tokens`, and none without those.

    Raises:
        ConfigError: an entry has an unknown field, or not just one of tokens, steps and GPU-hours; or no stage has
            the tokens that were asked for.
    """
    if not recipe:
        return [Stage("training", tokens=float(tokens))] if tokens else []
    stages = [_stage(entry) for entry in recipe]
    if tokens and not any(stage.tokens and abs(stage.tokens / tokens - 1) < 1e-3 for stage in stages):
        raise ConfigError(f"train.tokens={tokens} is of no stage of plan.recipe", "change the recipe, or leave it out")
    return stages


def _stage(entry: str) -> Stage:
    words, values = [], {}
    for word in entry.split():
        name, equals, value = word.partition("=")
        if not equals:
            words.append(word)
        elif name not in FIELDS:
            raise ConfigError(
                f"plan.recipe: {word} of '{entry}' is not one of {', '.join(FIELDS)}", "write NAME tokens=14.8T"
            )
        else:
            values[name] = count(value, f"plan.recipe: {name}", 1024 if name == "seq" else 1000)
    if zero := [name for name in ("seq", "batch", "cp", "steps") if values.get(name) == 0]:
        raise ConfigError(f"plan.recipe: {zero[0]}=0 of '{entry}'", "leave it out, or make it at least 1")
    if len(sizes := [name for name in ("tokens", "steps", "gpu_hours") if name in values]) != 1:
        what = " and ".join(sizes) if sizes else "no tokens, steps or gpu_hours"
        raise ConfigError(f"plan.recipe: '{entry}' has {what}", "write NAME tokens=14.8T")
    return Stage(
        " ".join(words) or "training", tokens=values.get("tokens"), seq=values.get("seq"), batch=values.get("batch"),
        steps=values.get("steps"), cp=values.get("cp"), gpu_hours=values.get("gpu_hours"),
        with_failures=bool(values.get("failures", 0)),
    )  # fmt: skip
