"""Lowers the learning rate where losses ask for it: after a plateau, a bad step, a rollback."""

from __future__ import annotations

from moe_train.config.schema import TrainConfig
from moe_train.resilience.reactions import ReactionState
from moe_train.run import Callback, Metrics, Run, TrainState


class LearningRateReactions(Callback):
    """Tells `Run.reactions` of bad steps, rollbacks and evaluations, and announces what follows.

    A resumed run evaluates once more before its first step. Only evaluations that are due are counted, each once, so
    that it reduces the learning rate in the same step as a run that was not interrupted.
    """

    def __init__(self) -> None:
        self._at_bad_step = ReactionState()
        self._bad_step = -1

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """A bad step begins a cool-down."""
        if not metrics.get("bad_step"):
            return
        step = run.state.step
        if run.reactions.on_bad_step(step):
            schedule = run.cfg.schedule
            run.announce(
                "lr_rewarm",
                factor=schedule.rewarm_factor,
                cooldown_steps=schedule.rewarm_cooldown_steps,
                rewarm_steps=schedule.rewarm_steps,
                count=run.reactions.state.rewarms,
            )
        self._at_bad_step, self._bad_step = run.reactions.state, step

    def on_rollback(self, run: Run) -> None:
        """The checkpoint knows nothing of the bad steps behind it."""
        run.reactions.on_rollback(self._at_bad_step, self._bad_step, run.state.step)

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        """Count the evaluation."""
        reactions, state = run.reactions, run.state
        if not reactions.reacts_to_plateaus or not _is_due(run.cfg.train, state, reactions.state):
            return
        if reactions.on_evaluation(metrics["valid_loss"], state.step, state.consumed_tokens):
            run.announce(
                "lr_reduced",
                factor=reactions.state.reduced,
                best=reactions.state.best,
                count=reactions.state.reductions,
            )


def _is_due(train: TrainConfig, state: TrainState, counted: ReactionState) -> bool:
    """Whether an interval has ended since the evaluation that was counted last."""
    if train.eval_interval_tokens is not None:
        interval = train.eval_interval_tokens
        return state.consumed_tokens // interval > counted.evaluated_tokens // interval
    if train.eval_interval_steps:
        return state.step // train.eval_interval_steps > counted.evaluated_step // train.eval_interval_steps
    return counted.evaluated_step < 0
