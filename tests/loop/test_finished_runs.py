"""A run that is done: what the same command, or one with something added, does to it."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench.fault_runs import SMALL
from launch import main
from launch.failures import RankError
from launch.local import forkserver
from moe_train.checkpoint import continuing
from moe_train.config.composition.compose import compose

TOKENS_OF_A_STEP = 8 * 32
KEPT = ("config.yaml", "summary.json", "metrics.jsonl")


def start(run_dir: Path, words: Sequence[str]) -> None:
    """As `moe-train` does on this machine."""
    words = [*words, f"run_dir={run_dir}"]
    main.train_here(continuing.continued(compose(words), words, compose))


def kept(run_dir: Path) -> list[bytes]:
    return [(run_dir / name).read_bytes() for name in KEPT]


@pytest.fixture
def own_fork_server() -> Iterator[None]:
    """Ranks print to where the server's output went when it started, so `capfd` needs one that starts in the test."""
    _end_fork_server()
    yield
    _end_fork_server()


def _end_fork_server() -> None:
    """Leaves it to be reaped by multiprocessing, which then knows that it has to start another one."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid
    forkserver.kill()
    if pid is not None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.usefixtures("own_fork_server")
def test_a_run_that_is_done_is_left_alone_exported_and_continued(
    tmp_path: Path, small_data: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    start(run_dir, [*SMALL, *small_data, "train.steps=4", "schedule.warmup_steps=0"])
    done = kept(run_dir)
    capfd.readouterr()

    start(run_dir, [])
    assert kept(run_dir) == done
    assert capfd.readouterr().out == (
        f"nothing to do: run_dir={run_dir} is at step 4 of 4; a larger train.steps or train.tokens continues it, "
        "another run_dir starts another run\n"
    )

    (run_dir / "hf").write_text("in the way")
    with pytest.raises(RankError) as failed:  # as with a full disk
        start(run_dir, ["export_hf=true"])
    assert failed.value.exit_code == 2
    assert "hf" in str(failed.value)
    (run_dir / "hf").unlink()
    capfd.readouterr()
    start(run_dir, ["export_hf=true"])
    exported = run_dir / "hf" / "step_00000004"
    assert f"Hugging Face weights in {exported}" in capfd.readouterr().out
    assert (exported / "manifest.json").exists()
    assert kept(run_dir)[1:] == done[1:]
    start(run_dir, [])  # which remembers that it exports, and has
    assert "nothing to do" in capfd.readouterr().out

    budget = 4 * TOKENS_OF_A_STEP + 3 * 2 * TOKENS_OF_A_STEP
    more = [f"train.tokens={budget}", "batch.global_batch_size=16", "schedule.on_resume=checkpoint"]
    start(run_dir, more)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if "lm_loss" in line}
    assert list(trained) == [1, 2, 3, 4, 5, 6, 7]
    assert trained[7]["tokens"] == budget
    assert trained[7]["lr"] == pytest.approx(1e-4)  # the end of the first schedule
    assert (run_dir / "hf" / "step_00000007").exists()
    (run_dir / "summary.json").unlink()  # as if the run had been killed after its last checkpoint
    capfd.readouterr()
    start(run_dir, [])
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 7
