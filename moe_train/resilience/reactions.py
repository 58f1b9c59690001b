"""How the learning rate reacts to losses: reductions on a plateau, a cool-down and re-warming after a bad step.

Every rank sees the same losses and reaches the same state, which checkpoints contain. No torch import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from moe_train.config.schedule import ScheduleConfig

_LARGEST = 1 << 62


@dataclass(frozen=True)
class ReactionState:
    """What has happened so far. It is saved in a checkpoint."""

    best: float | None = None
    """Lowest validation loss that counted as better."""
    not_better: int = 0
    """Evaluations in a row that were not better."""
    cooldown: int = 0
    """Evaluations still to come that are not counted."""
    reductions: int = 0
    reduced: float = 1.0
    """Product of the factors of all reductions."""
    evaluated_step: int = -1
    evaluated_tokens: int = -1
    """Step and tokens of the newest evaluation that was counted; -1 before the first."""
    rewarm_step: int = -1
    """Step after which the newest cool-down began; -1 before the first."""
    rewarms: int = 0


class Reactions:
    """The factor on the learning rate by what the run has seen.

    Reductions are those of torch's ReduceLROnPlateau with `mode="min"` and `threshold_mode="rel"`.
    """

    def __init__(self, cfg: ScheduleConfig) -> None:
        self._cfg = cfg
        self.state = ReactionState()

    @property
    def reacts_to_bad_steps(self) -> bool:
        """Whether a bad step or a rollback lowers the learning rate."""
        return self._cfg.rewarm_steps is not None

    @property
    def reacts_to_plateaus(self) -> bool:
        """Whether evaluations are counted."""
        return self._cfg.plateau_patience is not None

    def factor(self, step: int) -> float:
        """Factor on the learning rate of the step that follows `step` others."""
        return self.state.reduced * self._rewarming(step)

    def _rewarming(self, step: int) -> float:
        cfg, begun = self._cfg, self.state.rewarm_step
        if cfg.rewarm_steps is None or begun < 0 or step < begun:
            return 1.0
        done = step - begun - cfg.rewarm_cooldown_steps
        if done >= cfg.rewarm_steps:
            return 1.0
        return cfg.rewarm_factor + (1 - cfg.rewarm_factor) * max(0, done) / cfg.rewarm_steps

    def on_bad_step(self, step: int) -> bool:
        """Begin a cool-down after the bad step `step`; whether one began: `rewarm_max` bounds them.

        Bad steps in a row have one, which begins after the last of them.
        """
        if not self.reacts_to_bad_steps:
            return False
        continues = self.state.rewarms > 0 and self.state.rewarm_step == step - 1
        if not continues and self.state.rewarms >= self._cfg.rewarm_max:
            return False
        self.state = replace(self.state, rewarm_step=step, rewarms=self.state.rewarms + (not continues))
        return not continues

    def on_rollback(self, before: ReactionState, bad_step: int, step: int) -> None:
        """Keep the cool-down of the bad steps that led back to a checkpoint, whose state is the present one.

        Args:
            before: state at the last bad step, `bad_step`.
            step: of the checkpoint.
        """
        self.state = replace(self.state, rewarms=before.rewarms)
        if before.rewarms and before.rewarm_step == bad_step:
            self.state = replace(self.state, rewarm_step=step)

    def on_evaluation(self, loss: float, step: int, tokens: int) -> bool:
        """Count the evaluation after `step`; whether it reduced the learning rate."""
        cfg, state = self._cfg, replace(self.state, evaluated_step=step, evaluated_tokens=tokens)
        better = isfinite(loss) and (state.best is None or loss < state.best * (1 - cfg.plateau_threshold))
        state = replace(state, best=loss if better else state.best, not_better=0 if better else state.not_better + 1)
        if state.cooldown > 0:
            state = replace(state, cooldown=state.cooldown - 1, not_better=0)
        reduces = (
            cfg.plateau_patience is not None
            and state.not_better > cfg.plateau_patience
            and state.reductions < cfg.plateau_max_reductions
        )
        if reduces:
            state = replace(
                state,
                reductions=state.reductions + 1,
                reduced=state.reduced * cfg.plateau_factor,
                cooldown=cfg.plateau_cooldown,
                not_better=0,
            )
        self.state = state
        return reduces


def from_json(values: Mapping[str, Any]) -> ReactionState:
    """The state that a checkpoint has.

    Raises:
        ValueError: a value is none that a run writes.
    """
    usual = asdict(ReactionState())
    if unknown := values.keys() - usual.keys():
        raise ValueError(f"reactions has {min(map(str, unknown))}")
    for name, value in values.items():
        if not _may_be(name, value):
            raise ValueError(f"reactions has {name}={value!r:.100}")
    return ReactionState(**values)


def _may_be(name: str, value: Any) -> bool:
    if name == "best" and value is None:
        return True
    if name in ("best", "reduced"):
        is_number = type(value) in (int, float) and isfinite(value)
        return is_number and (name == "best" or 0 <= value <= 1)
    return type(value) is int and -1 <= value < _LARGEST
