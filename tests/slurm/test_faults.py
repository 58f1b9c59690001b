"""Time limits, signals, crashes on a real Slurm: the job comes back, and its losses are those of a quiet run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm
from tests.slurm.conftest import Jobs, losses

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture
def slow_python(tmp_path: Path) -> str:
    """In place of Python for `train.sbatch`: `launch.main` takes a second for each step."""
    script = tmp_path / "python"
    script.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -P -m tests.slurm.slowly "${{@:4}}"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="session")
def quiet(cluster: slurm.Cluster, tmp_path_factory: pytest.TempPathFactory, small_data: tuple[str, ...]) -> list[float]:
    """Losses of a run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("quiet")
    jobs = Jobs(cluster, directory, small_data)
    jobs.finish(jobs.submit(directory / "run", steps=STEPS))
    return losses(directory / "run")


def _resumed_at(run_dir: Path) -> list[int]:
    """Steps at which rank 0 continued, wherever it ran."""
    lines = [line for log in (run_dir / "logs").glob("*.log") for line in log.read_text().splitlines()]
    return sorted(int(line.split()[3]) for line in lines if line.startswith("resumed at step "))


def test_the_time_limit(jobs: Jobs, tmp_path: Path, slow_python: str, quiet: list[float]) -> None:
    """Two minutes are too short; the warning comes a minute before."""
    flags = ("--time=2", "--signal=B:USR1@60")
    job = jobs.submit(tmp_path / "run", flags=flags, steps=STEPS, MOE_PYTHON=slow_python, MOE_GRACE_S="60")
    facts = jobs.finish(job, 900)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert int(facts["Restarts"]) >= 1, output
    assert "the time limit is near: asking the ranks to save" in output
    assert "saved before the time limit: back to the queue" in output
    assert len(_resumed_at(tmp_path / "run")) == int(facts["Restarts"])
    assert losses(tmp_path / "run") == quiet


@pytest.mark.parametrize("start", ["torchrun", "mpirun"])
def test_a_warning_reaches_ranks_of_every_launcher(start: str, jobs: Jobs, tmp_path: Path) -> None:
    """Enough steps that none finishes before it is warned; then the job is cancelled as it waits to run again."""
    run_dir = tmp_path / "run"
    job = jobs.submit(run_dir, steps=100_000, MOE_START=start)
    jobs.wait_for_step(run_dir, 3)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    try:
        slurm.wait_for(lambda: jobs.facts(job).get("Restarts") == "1", 120)
    finally:
        jobs.cluster.run("scancel", job)
    assert "saved before the time limit" in (tmp_path / f"slurm-{job}.out").read_text(), jobs.logs(job)
    step = int(sorted((run_dir / "checkpoints").glob("step_*"))[-1].name.removeprefix("step_"))
    assert step == len(losses(run_dir))


def test_a_range_of_nodes_uses_all_that_the_job_got(jobs: Jobs, tmp_path: Path, undisturbed: list[float]) -> None:
    job = jobs.submit(tmp_path / "run", flags=("--nodes=1-2",))
    jobs.finish(job)
    assert "4 ranks by srun" in (tmp_path / f"slurm-{job}.out").read_text()
    assert losses(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("start", ["srun", "torchrun", "mpirun"])
def test_nodes_without_a_layout_stay_idle(start: str, jobs: Jobs, tmp_path: Path, undisturbed: list[float]) -> None:
    """Three nodes, and layouts for one, two and four: two of them train."""
    counts = {"MOE_NODE_COUNTS": "1 2 4", "MOE_START": start}
    job = jobs.submit(tmp_path / "run", flags=("--nodes=3",), **counts)
    jobs.finish(job)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "1 of 3 nodes stay idle: the largest layout that fits needs 2" in output
    assert len(list((tmp_path / "run/logs").glob("node*.log"))) == 2
    assert losses(tmp_path / "run") == undisturbed


def test_what_comes_after_the_warning_goes_back_to_the_queue(jobs: Jobs, tmp_path: Path) -> None:
    """The ranks fail as they are warned. New ones would not be: they would run until the time limit ends the job."""
    script = tmp_path / "python"
    fails = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1)); time.sleep(120)"
    script.write_text(f"#!/usr/bin/env bash\nexec {sys.executable} -c '{fails}'\n")
    script.chmod(0o755)
    job = jobs.submit(tmp_path / "run", MOE_PYTHON=str(script), MOE_RESTARTS="1")
    slurm.wait_for(lambda: (tmp_path / "run/logs").exists(), 60)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    try:
        slurm.wait_for(lambda: jobs.facts(job).get("Restarts") == "1", 120)
    finally:
        jobs.cluster.run("scancel", job)
    assert (
        "the ranks ended with 1 near the time limit: back to the queue" in (tmp_path / f"slurm-{job}.out").read_text()
    )


def test_a_requeued_run_continues_where_its_checkpoints_are(jobs: Jobs, tmp_path: Path) -> None:
    """Whatever it was told to start from first."""
    words = (f"checkpoint.dir={tmp_path}/elsewhere", "resume=never")
    job = jobs.submit(tmp_path / "run", *words, steps=100_000)
    jobs.wait_for_step(tmp_path / "run", 3)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    try:
        slurm.wait_for(lambda: bool(_resumed_at(tmp_path / "run")), 240)
    finally:
        jobs.cluster.run("scancel", job)
    assert _resumed_at(tmp_path / "run")[0] >= 3


@pytest.mark.parametrize("role", ["other", "first"])
def test_a_crashed_node(role: str, jobs: Jobs, tmp_path: Path, slow_python: str, quiet: list[float]) -> None:
    """The first node also runs the batch script."""
    run_dir = tmp_path / "run"
    job = jobs.submit(run_dir, "checkpoint.interval_steps=5", steps=STEPS, MOE_PYTHON=slow_python)
    jobs.wait_for_step(run_dir, 12)
    nodes = jobs.cluster.run("scontrol", "show", "hostnames", jobs.facts(job)["NodeList"]).split()
    node = nodes[0 if role == "first" else 1]
    done = len(losses(run_dir))
    jobs.cluster.crash(node)
    try:
        facts = jobs.finish(job, 900)
    finally:
        jobs.cluster.restart(node)
    assert int(facts["Restarts"]) >= 1, jobs.logs(job)
    assert node not in jobs.cluster.run("scontrol", "show", "hostnames", facts["NodeList"]).split()
    assert done - _resumed_at(run_dir)[0] <= 5 + 1  # a step may have ended between the count and the crash
    assert losses(run_dir) == quiet
    slurm.wait_for(lambda: jobs.cluster._idle() == 4, 60)


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_rank_is_started_again_in_the_job(
    jobs: Jobs, tmp_path: Path, slow_python: str, quiet: list[float]
) -> None:
    run_dir = tmp_path / "run"
    job = jobs.submit(run_dir, "checkpoint.interval_steps=5", steps=STEPS, MOE_PYTHON=slow_python)
    jobs.wait_for_step(run_dir, 7)
    ranks = [pid for pid in jobs.cluster.processes("node2") if b"tests.slurm.slowly" in _words(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    facts = jobs.finish(job, 600)
    assert facts["Restarts"] == "0"
    assert "attempt 1" in (tmp_path / f"slurm-{job}.out").read_text()
    assert losses(run_dir) == quiet


def test_fewer_nodes_continue_in_a_fallback_layout(jobs: Jobs, tmp_path: Path, undisturbed: list[float]) -> None:
    """Half of the run on 2 nodes in two stages, the rest on 1 node in one stage: the same batches, the same losses."""
    run_dir = tmp_path / "run"
    more = ("parallel.dp=2", "launcher.fallbacks=[{parallel:{pp:1,dp:2}}]", "schedule.decay_steps=4")
    jobs.finish(jobs.submit(run_dir, *more, steps=2))
    job = jobs.submit(run_dir, *more, flags=("--nodes=1",), steps=4)
    jobs.finish(job)
    assert _resumed_at(run_dir) == [2]
    assert losses(run_dir) == pytest.approx(undisturbed, abs=1e-4)
    assert "saved by pp2 ep2 dp2, continued by ep2 dp2" in (run_dir / "logs/node1.log").read_text()


@pytest.mark.parametrize("start", ["srun", "torchrun"])
def test_the_code_of_a_rank_reaches_the_job_and_ends_its_chain(start: str, jobs: Jobs, tmp_path: Path) -> None:
    """Another node's rank finds that nothing can help, and the others are killed as they wait for it."""
    script = tmp_path / "python"
    rank = f"exec {sys.executable} -c 'from launch.failures import leave_code; leave_code(5); raise SystemExit(5)'"
    script.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ $3 == launch.main ]] || exec {sys.executable} "$@"\n'
        f"((${{RANK:-$SLURM_PROCID}} == 3)) && {rank}\nsleep 5; kill -KILL $$\n"
    )
    script.chmod(0o755)
    for attempts in (1, 0):
        job = jobs.submit(tmp_path / "run", MOE_PYTHON=str(script), MOE_SUBMITTED="chain", MOE_START=start)
        assert jobs.end(job)["ExitCode"] == "5:0", jobs.logs(job)
        output = (tmp_path / f"slurm-{job}.out").read_text()
        assert output.count(", attempt ") == attempts, output
    assert "of this chain ended with exit code 5, and this one would too" in output
