"""A bad step changes nothing but the position in the data; too many of them lead back to a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint import checkpoint
from moe_train.config.resilience import Fault
from moe_train.loop import step
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.loop.callbacks.inject import InjectFaults
from moe_train.loop.callbacks.recovery import Recovery
from moe_train.resilience.bad_steps import DivergedError
from moe_train.run import Run
from moe_train.telemetry.sinks.jsonl import MetricsFile, read
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.loop.fake_run import with_sinks

BATCH = small_run.BATCH


def go_on(run: Run, steps: int) -> list[dict[str, Any]]:
    """Take steps with the callbacks, as moe_train.train does: the data follows the state."""
    lines = []
    for _ in range(steps):
        for callback in run.callbacks:
            callback.on_step_begin(run)
        lines.append(step.train_step(run, small_run.batches(run)))
        for callback in run.callbacks:
            callback.on_step_end(run, lines[-1])
    return lines


def begin(run_dir: Path, degrees: dict[str, int], inject: list[Fault], **settings: Any) -> Run:
    changes = small_run.two_micro_batches(degrees) | {f"resilience__{name}": value for name, value in settings.items()}
    run = small_run.prepare(small_run.config(run_dir, degrees, resilience__inject=inject, **changes))
    run.cfg.checkpoint.interval_steps, run.total_steps = 2, 100
    checkpoints = CheckpointCallback()
    sinks, close = with_sinks(run, MetricsFile)
    run.callbacks = [sinks, InjectFaults(), Recovery(checkpoints), checkpoints, close]
    for callback in run.callbacks:
        callback.on_start(run)
    run.clock.start()
    return run


def skip_one(run_dir: Path, degrees: dict[str, int], fault: str, changes: dict[str, Any]) -> dict[str, Any]:
    run = begin(run_dir, degrees, [fault], **changes)
    go_on(run, 2)
    before, state, updates = small_run.bits(run), asdict(run.state), run.schedule.num_steps
    bad = go_on(run, 1)[0]
    after = small_run.bits(run)
    good = go_on(run, 1)[0]
    return {
        "same": [a == b for a, b in zip(before, after, strict=True)],
        "moved": {name: value - state[name] for name, value in asdict(run.state).items()},
        "updates": run.schedule.num_steps - updates,
        "bad": bad,
        "good": good,
        "moves on": before != small_run.bits(run),
    }


@pytest.mark.parametrize(
    ("degrees", "fault", "reason", "changes"),
    [
        ({"tp": 2, "ep": 2}, Fault("nan", step=3), "lm_loss is nan", {}),
        ({"pp": 2}, Fault("nan", step=3), "lm_loss is nan", {}),
        ({"ep": 2}, Fault("spike", step=3, factor=50), "lm_loss is", {"spike_factor": 3.0, "spike_window": 2}),
        ({"ep": 2}, Fault("spike", step=3, factor=1e25), "grad_norm is", {}),
    ],
)
def test_a_bad_step_leaves_no_trace(
    degrees: dict[str, int], fault: str, reason: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, router biases, moments and random streams, bit by bit, on every rank."""
    for found in run_distributed(skip_one, 2, tmp_path, degrees, fault, changes):
        assert all(found["same"])
        assert len(found["same"]) > 20
        assert found["bad"]["bad_step"].startswith(reason)
        assert found["bad"]["skipped"] is True
        assert found["moved"] == {
            "step": 2, "consumed_samples": 2 * BATCH, "consumed_tokens": 2 * BATCH * small_run.SEQUENCE,
            "trained_samples": 2 * BATCH, "optimizer_updates": 1,
        }  # fmt: skip
        assert found["updates"] == 1
        assert "skipped" not in found["good"]
        assert math.isfinite(found["good"]["lm_loss"])
        assert found["moves on"]
    events = [line for line in read(tmp_path / "metrics.jsonl") if "event" in line]
    assert [(line["step"], line["event"], line["in_a_row"]) for line in events] == [(3, "skipped", 1)]


def go_back(run_dir: Path) -> dict[str, Any]:
    """Data that is bad in steps 6 to 8 of a run with checkpoints after 2 and 4, in a directory with another run's."""
    other = small_run.prepare(small_run.config(run_dir, {"ep": 2}, seed=7, **small_run.two_micro_batches({"ep": 2})))
    small_run.train(other, 5)
    checkpoint.save(other)
    run = begin(run_dir, {"ep": 2}, [Fault("nan", sample=5 * BATCH, samples=3 * BATCH)])
    go_on(run, 4)
    saved = small_run.bits(run)
    go_on(run, 4)
    back = small_run.bits(run), asdict(run.state), run.schedule.num_steps
    later = [line["lm_loss"] for line in go_on(run, 2)]
    from_four = {"resume": str(run_dir / "checkpoints/step_00000004"), **small_run.two_micro_batches({"ep": 2})}
    resumed = small_run.prepare(small_run.config(run_dir, {"ep": 2}, **from_four))
    checkpoint.resume(resumed)
    return {
        "saved": saved,
        "back": back,
        "later": later,
        "again": small_run.train(resumed, 2),
        "end": asdict(run.state),
    }


def test_too_many_bad_steps_lead_back_and_past_their_data(tmp_path: Path) -> None:
    """The bad data is not met again, neither by the run that went back nor by one that resumes after it."""
    for found in run_distributed(go_back, 2, tmp_path):
        bits, state, updates = found["back"]
        assert bits == found["saved"]
        assert (state["step"], state["consumed_samples"], updates) == (4, 8 * BATCH, 4)
        assert (state["trained_samples"], state["optimizer_updates"]) == (4 * BATCH, 4)
        assert found["end"]["consumed_samples"] == 10 * BATCH
        assert all(math.isfinite(loss) for loss in found["later"])
        assert found["again"] == found["later"]
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["event"]) for line in lines if line.get("event") == "skipped"] == [
        (step, "skipped") for step in (6, 7, 8)
    ]
    assert [line for line in lines if line.get("event") == "rolled_back"] == [
        {"step": 4, "event": "rolled_back", "reason": "lm_loss is nan", "from_step": 8,
         "samples_skipped": 4 * BATCH}
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (2, 4, 5, 6)
    ]  # 5 is the other run's, and 6 was good when it was reached again


def end_of(run_dir: Path, settings: dict[str, Any], interval: int) -> list[Any]:
    run = begin(run_dir, {}, [Fault("nan", sample=2 * BATCH, samples=1000)], **settings)
    run.cfg.checkpoint.interval_steps = interval
    try:
        go_on(run, 20)
    except DivergedError as error:
        return [error.exit_code, str(error), run.state.step, run.state.consumed_samples // BATCH]
    return []


def ends(run_dir: Path) -> list[list[Any]]:
    return [
        end_of(run_dir / "stop", {"on_bad_step": "stop"}, 2),
        end_of(run_dir / "none", {"max_bad_steps": 2}, 0),
        end_of(run_dir / "twice", {"max_bad_steps": 2, "max_rollbacks": 2}, 2),
        end_of(run_dir / "at_once", {"on_bad_step": "rollback", "max_rollbacks": 1}, 1),
    ]


def test_a_run_that_stays_bad_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    stop, none, twice, at_once = run_distributed(ends, 1, tmp_path)[0]
    assert stop == [5, "step 3 is bad: lm_loss is nan; see its data, or set on_bad_step=skip", 3, 3]
    assert none[1].startswith("steps 3 to 4 are bad (lm_loss is nan), and there is no checkpoint before them; ")
    assert twice[1].startswith("steps 3 to 4 are bad (lm_loss is nan) after 2 times back to a checkpoint; ")
    assert twice[2:] == [4, 8]  # two good batches, and three times two bad ones
    assert at_once[0] == 5
    assert at_once[2:] == [3, 4]
