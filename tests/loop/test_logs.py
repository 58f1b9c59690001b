"""run.log and TensorBoard events."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_train.loop.callbacks.run_log import RunLog
from moe_train.loop.callbacks.tensorboard import TensorBoard
from tests.loop.fake_run import evaluate, fake_run, take_step


def test_the_log_has_records_and_warnings_of_the_main_rank(tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    run = fake_run(tmp_path / "run")
    callback = RunLog(run)
    logging.getLogger("moe_train.somewhere").info("told by us")
    logging.getLogger("megatron.somewhere").info("chatter")
    logging.getLogger("megatron.somewhere").warning("told by a library")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # pytest has put its own in place
        warnings.warn("mind this", UserWarning, stacklevel=1)
        callback.on_start(run)
        run.completed = True
        callback.on_end(run)
    text = (tmp_path / "run" / "run.log").read_text()
    for expected in (
        "INFO moe_train.somewhere: told by us",
        "told by a library",
        "mind this",
        "from step 0 to 10",
        "done",
    ):
        assert expected in text
    assert "chatter" not in text
    assert "\x1b" not in text
    assert logging.getLogger().handlers == handlers


def test_the_log_tells_that_a_run_stopped(tmp_path: Path) -> None:
    run = fake_run(tmp_path, step=3)
    RunLog(run).on_end(run)
    assert "stopped by an error at step 3" in (tmp_path / "run.log").read_text()


def test_other_ranks_have_no_log(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rank=1)
    RunLog(run).on_end(run)
    assert list(tmp_path.iterdir()) == []


def _scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_names_of_the_metrics_file_and_survives_a_resume(tmp_path: Path) -> None:
    for start, loss in ((0, 5.0), (2, 4.0)):
        run, callback = fake_run(tmp_path, step=start), TensorBoard()
        callback.on_start(run)
        for _ in range(3):
            take_step(run, [callback], loss)
        evaluate(run, [callback], loss)
        callback.on_end(run)
    scalars = _scalars(tmp_path)
    assert scalars["lm_loss"] == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0), (5, 4.0)]
    assert scalars["valid_loss"] == [(5, 4.0)]
    assert scalars["mfu"][0] == (1, pytest.approx(0.25))
    assert scalars["expert_load_imbalance/layer_2"][0] == (1, 1.5)
    assert scalars["expert_load_imbalance/layer_4"][0][1] == pytest.approx(200 / 128)
    assert "expert_load_imbalance/layer_1" not in scalars  # dense
