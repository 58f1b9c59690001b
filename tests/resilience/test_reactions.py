"""Reactions of the learning rate: plateaus as torch counts them, cool-downs that are bounded, state as JSON."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from moe_train.config.schedule import ScheduleConfig
from moe_train.resilience.reactions import Reactions, ReactionState, from_json


@pytest.mark.parametrize(("patience", "cooldown"), [(0, 0), (2, 0), (1, 3)])
def test_plateaus_are_those_of_torch(patience: int, cooldown: int) -> None:
    settings: dict[str, Any] = {"plateau_patience": patience, "plateau_cooldown": cooldown}
    ours = Reactions(ScheduleConfig(**settings, plateau_threshold=0.01, plateau_max_reductions=100))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=0.01, cooldown=cooldown, eps=0)
    rng = random.Random(patience)
    reductions = 0
    for number in range(60):
        loss = 4 - 0.02 * number + rng.uniform(-0.1, 0.1)
        theirs.step(loss)
        reductions += ours.on_evaluation(loss, number, 100 * number)
        assert ours.factor(number) == optimizer.param_groups[0]["lr"], number
    assert 2 < reductions == ours.state.reductions < 60
    assert (ours.state.evaluated_step, ours.state.evaluated_tokens) == (59, 5900)


def test_reductions_are_bounded_and_a_loss_that_is_not_finite_is_not_better() -> None:
    reactions = Reactions(ScheduleConfig(plateau_patience=0, plateau_max_reductions=2))
    losses = [float("nan"), 3.0, float("nan"), 3.0, 3.0, 3.0]
    assert [reactions.on_evaluation(loss, step, 0) for step, loss in enumerate(losses)] == [True, False, True] + 3 * [
        False
    ]
    assert reactions.state.best == 3.0
    assert reactions.factor(10) == 0.25


def test_without_settings_nothing_reacts() -> None:
    reactions = Reactions(ScheduleConfig())
    assert not reactions.on_bad_step(3)
    for step in range(20):
        reactions.on_evaluation(1.0, step, 0)
    reactions.on_rollback(ReactionState(), 3, 2)
    assert {reactions.factor(step) for step in range(20)} == {1.0}


def test_a_cool_down_and_re_warming() -> None:
    reactions = Reactions(ScheduleConfig(rewarm_steps=4, rewarm_factor=0.2, rewarm_cooldown_steps=2))
    assert reactions.on_bad_step(10)
    assert not reactions.on_bad_step(11)  # of the same row
    found = [reactions.factor(step) for step in range(10, 19)]
    assert found == pytest.approx([1, 0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert reactions.state.rewarms == 1


def test_cool_downs_are_bounded() -> None:
    reactions = Reactions(ScheduleConfig(rewarm_steps=4, rewarm_max=2))
    assert [reactions.on_bad_step(step) for step in (1, 3, 5, 6)] == [True, True, False, False]
    assert reactions.state.rewarm_step == 3
    before = reactions.state
    reactions.state = ReactionState()  # of a checkpoint
    reactions.on_rollback(before, 6, 2)
    assert (reactions.state.rewarms, reactions.state.rewarm_step) == (2, -1)


def test_going_back_keeps_the_cool_down() -> None:
    reactions = Reactions(ScheduleConfig(rewarm_steps=4, rewarm_factor=0.5))
    reactions.on_bad_step(7)
    before = reactions.state
    reactions.state = ReactionState(best=2.0)
    reactions.on_rollback(before, 7, 4)
    assert asdict(reactions.state) == asdict(ReactionState(best=2.0, rewarm_step=4, rewarms=1))
    assert reactions.factor(4) == 0.5


def test_a_plateau_lowers_what_re_warms() -> None:
    reactions = Reactions(ScheduleConfig(plateau_patience=0, rewarm_steps=2, rewarm_factor=0.1))
    reactions.on_evaluation(1.0, 0, 0)
    reactions.on_evaluation(1.0, 1, 0)
    reactions.on_bad_step(2)
    assert [reactions.factor(step) for step in (2, 3, 4)] == pytest.approx([0.05, 0.275, 0.5])


def test_the_state_survives_json() -> None:
    state = ReactionState(best=1 / 3, not_better=2, reduced=0.1**3, evaluated_step=50, rewarm_step=7, rewarms=1)
    assert from_json(json.loads(json.dumps(asdict(state)))) == state
    assert from_json({}) == ReactionState()


@pytest.mark.parametrize(
    "values",
    [
        {"rewarms": 1.5},
        {"best": "1"},
        {"best": float("nan")},
        {"reductions": True},
        {"unknown": 1},
        {"reduced": None},
        {"reduced": 1.5},
        {"rewarm_step": -2},
        {"evaluated_tokens": 1 << 62},
    ],
)
def test_a_state_that_no_run_writes_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reactions has"):
        from_json(values)
