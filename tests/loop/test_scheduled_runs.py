"""Runs whose values follow schedules: they are applied in every chunk, and a resumed run is the same bit by bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_train import train as train_module
from moe_train.checkpoint import checkpoint
from moe_train.config.resilience import Fault
from moe_train.config.schedule import ScheduleSegment
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.loop.callbacks.inject import InjectFaults
from moe_train.loop.callbacks.reactions import LearningRateReactions
from moe_train.loop.callbacks.recovery import Recovery
from moe_train.run import Callback, Metrics, Run
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

STEPS, BAD = 9, 6
INSIDE = {"ramp": 2, "plateau": 3, "re-warm": 7}
"""Steps after which a run is interrupted."""
SCHEDULES: dict[str, Any] = {
    "schedule__warmup_steps": 1,
    "schedule__lr": [ScheduleSegment("constant", until_fraction=0.5), ScheduleSegment("1-sqrt", ratio=0.1)],
    "schedule__batch_size": [ScheduleSegment("linear", start=2, until_tokens=320, value=8), ScheduleSegment()],
    "schedule__weight_decay": [ScheduleSegment("linear", start=0.2, value=0.0)],
    "schedule__mtp_loss_coeff": [ScheduleSegment(until_steps=4, value=0.3), ScheduleSegment(value=0.1)],
    "schedule__plateau_patience": 1,
    "schedule__plateau_threshold": 0.9,
    "schedule__rewarm_steps": 3,
    "schedule__rewarm_factor": 0.2,
}


class Recorder(Callback):
    """Keeps metrics and events."""

    def __init__(self) -> None:
        self.lines: list[Metrics] = []
        self.events: list[Metrics] = []

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        names = ("lm_loss", "grad_norm", "lr", "weight_decay", "mtp_loss_coeff")
        self.lines.append({"step": run.state.step, **{name: metrics[name] for name in names}})

    def on_event(self, run: Run, event: Metrics) -> None:
        self.events.append(event)


def trained(run_dir: Path, resume: str = "auto", **changes: Any) -> dict[str, Any]:
    """A whole run, or the rest of one that resumes."""
    cfg = small_run.config(run_dir, {"ep": 2}, train__steps=STEPS, resume=resume, **SCHEDULES | changes)
    cfg.batch.global_batch_size, cfg.train.eval_interval_steps, cfg.train.eval_batches = 8, 2, 1
    cfg.checkpoint.interval_steps, cfg.resilience.inject = 1, [Fault("nan", step=BAD)]
    run = small_run.prepare(cfg)
    checkpoints, recorder = CheckpointCallback(), Recorder()
    run.callbacks = [recorder, InjectFaults(), LearningRateReactions(), Recovery(checkpoints), checkpoints]
    checkpoint.resume(run)
    train_module.set_length(run)
    train_module.build_datasets = lambda *_: (small_run.Samples(200), small_run.Samples(200), None)
    train_module.train(run)
    return {
        "lines": recorder.lines, "events": recorder.events, "bits": small_run.bits(run),
        "state": asdict(run.state), "reactions": asdict(run.reactions.state),
    }  # fmt: skip


def resumed_everywhere(run_dir: Path) -> dict[str, Any]:
    whole = trained(run_dir / "whole")
    found = {"whole": whole}
    for name, step in INSIDE.items():
        found[name] = trained(run_dir / name, str(run_dir / f"whole/checkpoints/step_{step:08d}"))
    found["back"] = trained(run_dir / "back", resilience__on_bad_step="rollback")
    return found


def test_a_run_resumes_inside_of_a_ramp_a_plateau_and_a_re_warming_bit_by_bit(tmp_path: Path) -> None:
    for found in run_distributed(resumed_everywhere, 2, tmp_path):
        whole = found["whole"]
        for name, step in INSIDE.items():
            for kind in ("bits", "state", "reactions"):
                assert found[name][kind] == whole[kind], (name, kind)
            assert repr(found[name]["lines"]) == repr(whole["lines"][step:])  # NaN is not equal to itself
            assert found[name]["events"] == [event for event in whole["events"] if event["step"] > step or (
                event["event"] == "lr_reduced" and event["step"] == step)]  # fmt: skip
        # 2, 2, 2, 2, 4, 4, 6, 8, 8 sequences of 16 tokens. The bad step counts too.
        assert whole["state"]["consumed_samples"] == 38
        assert whole["state"]["optimizer_updates"] == STEPS - 1
        # Evaluations after 0, 2, 4, 6, 8 steps, of which only the first is better.
        assert [(event["step"], event["event"]) for event in whole["events"]] == [
            (4, "lr_reduced"), (6, "lr_rewarm"), (6, "skipped"), (8, "lr_reduced")
        ]  # fmt: skip
        total, tokens = 16 * 38, [16 * samples for samples in (0, 2, 4, 6, 8, 12, 16, 22, 30)]
        decay = [1 if at < total // 2 else 1 - 0.9 * (2 * at / total - 1) ** 0.5 for at in tokens]
        factor = [1, 1, 1, 1, 0.5, 0.5, 0.5 * 0.2, 0.5 * (0.2 + 0.8 / 3), 0.25 * (0.2 + 1.6 / 3)]
        rates = [0, *(3e-4 * height * times for height, times in zip(decay[1:], factor[1:], strict=True))]
        lines = whole["lines"]
        assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-12)
        assert [line["weight_decay"] for line in lines] == pytest.approx([0.2 * (1 - at / total) for at in tokens])
        assert [line["mtp_loss_coeff"] for line in lines] == [0.3] * 4 + [0.1] * 5
        back = found["back"]
        assert [event["event"] for event in back["events"]] == ["lr_reduced", "lr_rewarm", "skipped", "rolled_back"] + [
            "lr_reduced"
        ] * (len(back["events"]) - 4)
        assert back["reactions"]["rewarm_step"] == 5
        assert back["reactions"]["rewarms"] == 1
        after = [line["lr"] for line in back["lines"]][BAD:]
        assert after[0] == pytest.approx(3e-4 * decay[5] * 0.5 * 0.2)


VALUES = {
    "mtp_loss_coeff": ("model__mtp_loss_coeff", 0.7),
    "router_bias_update_rate": ("model__router_bias_update_rate", 0.05),
    "weight_decay": ("optimizer__weight_decay", 0.4),
    "lr": ("optimizer__lr", 2e-3),
}
LAYOUT = {"pp": 2, "vpp": 2}


def steps_of(run_dir: Path, changes: dict[str, Any]) -> list[bytes]:
    run = small_run.prepare(small_run.config(run_dir, LAYOUT, **small_run.two_micro_batches(LAYOUT) | changes))
    small_run.train(run, 3)
    return small_run.bits(run)


def with_and_without_schedules(run_dir: Path) -> list[list[bytes]]:
    constant = dict(VALUES.values())
    by_schedule = {f"schedule__{name}": [ScheduleSegment(value=value)] for name, (_, value) in VALUES.items()}
    scale = {"schedule__balance_loss_scale": [ScheduleSegment(value=30.0)]}
    return [
        steps_of(run_dir, constant | {"model__balance_loss_coeffs": [30.0 * 1e-3]}),
        steps_of(run_dir, by_schedule | scale),
        steps_of(run_dir, by_schedule),
        *(steps_of(run_dir, {key: by_schedule[key]}) for key in by_schedule),
        steps_of(run_dir, {}),
    ]


def test_a_scheduled_value_does_what_the_configured_one_does(tmp_path: Path) -> None:
    """On chunks of an interleaved pipeline, bit by bit; and each of the values has an effect."""
    found = run_distributed(with_and_without_schedules, 2, tmp_path)
    for constant, scheduled, *_ in found:
        assert scheduled == constant
    different = [{tuple(part) for part in parts} for parts in zip(*(one[1:] for one in found), strict=True)]
    assert len({frozenset(parts) for parts in different}) == len(different)
