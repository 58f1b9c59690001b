"""run.log."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from moe_train.telemetry.sinks.run_log import RunLog
from tests.loop.fake_run import end, evaluate, fake_run, start, with_sinks


def test_the_log_has_records_and_warnings_of_the_main_rank(tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    run = fake_run(tmp_path / "run")
    callbacks = with_sinks(run, RunLog)
    logging.getLogger("moe_train.somewhere").info("told by us")
    logging.getLogger("megatron.somewhere").info("chatter")
    logging.getLogger("megatron.somewhere").warning("told by a library")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # pytest has put its own in place
        warnings.warn("mind this", UserWarning, stacklevel=1)
        start(run, callbacks)
        evaluate(run, callbacks, 4.5)
        run.completed = True
        end(run, callbacks)
    text = (tmp_path / "run" / "run.log").read_text()
    for expected in (
        "INFO moe_train.somewhere: told by us",
        "told by a library",
        "mind this",
        "from step 0 to 10",
        "INFO moe_train: step 0: validation loss 4.5000",
        "done",
    ):
        assert expected in text
    assert "chatter" not in text
    assert "\x1b" not in text
    assert logging.getLogger().handlers == handlers


def test_the_log_tells_that_a_run_stopped(tmp_path: Path) -> None:
    run = fake_run(tmp_path, step=3)
    end(run, with_sinks(run, RunLog))
    assert "stopped by an error at step 3" in (tmp_path / "run.log").read_text()


def test_other_ranks_have_no_log(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rank=1)
    end(run, with_sinks(run, RunLog))
    assert list(tmp_path.iterdir()) == []
