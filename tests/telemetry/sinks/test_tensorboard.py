"""TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_train.telemetry.sinks.tensorboard import TensorBoard
from tests.loop.fake_run import end, evaluate, fake_run, start, take_step, with_sinks


def _scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_names_of_the_metrics_file_and_survives_a_resume(tmp_path: Path) -> None:
    for first, loss in ((0, 5.0), (2, 4.0)):
        run = fake_run(tmp_path, step=first)
        callbacks = with_sinks(run, TensorBoard)
        start(run, callbacks)
        for _ in range(3):
            take_step(run, callbacks, loss)
        evaluate(run, callbacks, loss)
        end(run, callbacks)
    scalars = _scalars(tmp_path)
    assert not {"step", "tokens", "global_batch_size", "expert_load"} & scalars.keys()
    assert scalars["lm_loss"] == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0), (5, 4.0)]
    assert scalars["valid_loss"] == [(5, 4.0)]
    assert scalars["mfu"][0] == (1, pytest.approx(0.25))
    assert scalars["expert_load_imbalance/layer_2"][0] == (1, 1.5)
    assert scalars["expert_load_imbalance/layer_4"][0][1] == pytest.approx(200 / 128)
    assert "expert_load_imbalance/layer_1" not in scalars  # dense
