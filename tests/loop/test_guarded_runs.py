"""Whole runs that a fault meets, started by the local launcher: they finish with the losses of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fault_runs import SMALL
from launch import failures
from launch.failures import RankError
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resilience import Fault
from moe_train.telemetry.sinks.jsonl import read
from parallel.exit_codes import ExitCode
from parallel.suggest import override_value
from tests.launch import programs

pytestmark = pytest.mark.slow
STEPS = 12
LAYOUT = ["parallel.tp=2", "parallel.ep=2", "parallel.dp=1"]


def train(
    run_dir: Path, data: tuple[str, ...], *overrides: str, inject: tuple[Fault, ...] = ()
) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    faults = [f"resilience.inject={override_value(inject)}"] if inject else []
    cfg = compose([
        *SMALL, *data, *LAYOUT, f"train.steps={STEPS}", "checkpoint.interval_steps=4", "launcher.restarts=2",
        *overrides, *faults, f"run_dir={run_dir}",
    ])  # fmt: skip
    launcher.start(cfg, validate(cfg))
    return list(read(run_dir / "metrics.jsonl"))


def losses(lines: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(line["step"], line["lm_loss"], line["grad_norm"]) for line in lines if "lm_loss" in line]


@pytest.fixture(scope="module")
def undisturbed(
    small_data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, float, float]]:
    return losses(train(tmp_path_factory.mktemp("undisturbed"), small_data))


@pytest.mark.parametrize(
    ("inject", "settings", "told"),
    [
        ((Fault("kill", rank=0, step=7), Fault("kill", rank=1, step=10)), (), "rank 0 was killed by SIGKILL"),
        ((Fault("kill", rank=1, step=8, at="end", after=0.01),), (), "rank 1 was killed by SIGKILL"),
        ((Fault("hang", rank=1, step=7),), ("resilience.hang_timeout_s=4",), "hangs in step 7, callbacks, in _do ("),
        ((Fault("stop", rank=1, step=7),), ("resilience.hang_timeout_s=4",), "rank 1 ("),
        ((Fault("raise", rank=1, step=2),), (), "rank 1: RuntimeError: injected error"),
    ],
    ids=["killed", "killed while saving", "hung", "stopped", "error"],
)
def test_a_run_recovers_with_the_same_losses(
    inject: tuple[Fault, ...], settings: tuple[str, ...], told: str, undisturbed: list[Any],
    small_data: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert losses(train(tmp_path, small_data, *settings, inject=inject)) == undisturbed
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len([line for line in warnings if "starting again" in line]) == len(inject)
    assert told in warnings[0]


def test_data_that_is_bad_is_skipped(undisturbed: list[Any], small_data: tuple[str, ...], tmp_path: Path) -> None:
    """Steps 6 to 8 meet it; the run goes back to step 4, and is not done before it has taken all its steps."""
    lines = train(tmp_path, small_data, inject=(Fault("nan", sample=40, samples=24),))
    found = losses(lines)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert found[:4] == undisturbed[:4]
    assert found[4][1] != undisturbed[4][1]  # other data
    assert all(loss is not None for _, loss, _ in found)
    assert [(line["step"], line["from_step"]) for line in lines if line.get("event") == "rolled_back"] == [(4, 8)]
    assert not any("skipped" in line for line in lines if "lm_loss" in line)


def test_a_run_that_diverges_is_not_started_again(small_data: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"are bad \(lm_loss is nan\) after 2 times back to a checkpoint") as ended:
        train(tmp_path, small_data, inject=(Fault("nan", sample=40, samples=100000),))
    assert ended.value.exit_code == 5


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_slow_rank_is_named(action: str, small_data: tuple[str, ...], tmp_path: Path) -> None:
    settings = ("resilience.straggler_interval_steps=2", "resilience.straggler_intervals=2")
    slow = (Fault("slow", rank=1, step=1, steps=100, seconds=0.3),)
    wanted = (*settings, f"resilience.straggler_action={action}", "parallel.tp=1", "parallel.dp=2")
    if action == "stop":
        with pytest.raises(SystemExit) as ended:
            train(tmp_path, small_data, *wanted, inject=slow)
        assert ended.value.code == 3
    else:
        train(tmp_path, small_data, *wanted, inject=slow)
    found = [line for line in read(tmp_path / "metrics.jsonl") if line.get("event") == "straggler"]
    named = {line["rank"] for line in found if line["what"] == "busy time of a step"}
    # Where other processes have the cores, the GEMM of a rank may be slow too, and ends the run as well.
    assert named == {1} or (action == "stop" and found and not named)


def test_a_storm_of_signals_saves_once_and_the_run_continues(
    undisturbed: list[Any], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    """As ranks of torchrun: SIGTERM and SIGUSR1, fifty of each, in step 6."""
    words = [*SMALL, *small_data, *LAYOUT, f"train.steps={STEPS}", f"run_dir={tmp_path}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", sys.executable, "-m",
               "launch.main", *words, "resilience.inject=[{kind:term,rank:1,step:6,factor:50.0}]"]  # fmt: skip
    code = tmp_path / "code"
    environment = programs.environment(**{failures.LEFT: str(code)})
    done = subprocess.run(command, cwd=programs.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr  # torchrun's
    assert code.read_text() == f"{ExitCode.SAVED}\n"  # that of the ranks
    assert done.stdout.count("stopped at step 6 by") == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000006"]
    assert losses(train(tmp_path, small_data)) == undisturbed


def test_ctrl_c_leaves_nothing_half_written(
    undisturbed: list[Any], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    words = [*SMALL, *small_data, *LAYOUT, f"train.steps={STEPS}", "checkpoint.interval_steps=1", f"run_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.main", *words], cwd=programs.ROOT, env=programs.environment(),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        programs.wait_for(lambda: (tmp_path / "checkpoints" / "step_00000003").exists(), 200)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT
        programs.wait_for(lambda: not programs.alive(process.pid), 30)
    finally:
        process.kill()
    assert losses(train(tmp_path, small_data)) == undisturbed
