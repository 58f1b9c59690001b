"""How jobs end on a real Slurm: by SIGTERM to the batch script, after the last step, as links of a chain."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm
from tests.slurm.conftest import Jobs, losses
from tests.slurm.test_submit import ONE, moe_submit

pytestmark = pytest.mark.slow


def _python(tmp_path: Path, module: str) -> str:
    """In place of Python for `train.sbatch`: it runs `module` instead of `launch.main`."""
    script = tmp_path / "python"
    script.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -P -m {module} "${{@:4}}"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("target", ["--batch", "--full"])
@pytest.mark.parametrize("start", ["srun", "torchrun", "mpirun"])
def test_sigterm_to_the_batch_script_lets_the_ranks_save(start: str, target: str, jobs: Jobs, tmp_path: Path) -> None:
    """And the job does not go back to the queue. `--full` also signals the script's process group."""
    run_dir = tmp_path / "run"
    job = jobs.submit(run_dir, steps=100_000, MOE_START=start)
    jobs.wait_for_step(run_dir, 3)
    jobs.cluster.run("scancel", target, "--signal=TERM", job)
    facts = jobs.end(job, 240)
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0"), jobs.logs(job)
    assert "saved on request" in (tmp_path / f"slurm-{job}.out").read_text()
    step = int(sorted((run_dir / "checkpoints").glob("step_*"))[-1].name.removeprefix("step_"))
    assert step == len(losses(run_dir)) > 3


def test_the_warning_after_the_last_step_does_not_start_the_job_again(jobs: Jobs, tmp_path: Path) -> None:
    """Ranks are done, and their interpreters still end."""
    file = tmp_path / "lingering"
    variables = {"MOE_PYTHON": _python(tmp_path, "tests.slurm.lingering"), "TEST_LINGER": str(file)}
    job = jobs.submit(tmp_path / "run", **variables)
    slurm.wait_for(file.exists, 300)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    facts = jobs.finish(job)
    assert facts["Restarts"] == "0"
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "the time limit is near: asking the ranks to save" in output
    assert output.count(", attempt ") == 1, output
    assert len(losses(tmp_path / "run")) == 4


def test_a_chain_ends_with_the_link_that_completes_the_run(jobs: Jobs, tmp_path: Path) -> None:
    """The first link meets its time limit, the second one finishes, and Slurm cancels all others."""
    run_dir = tmp_path / "run"
    words = [*jobs.overrides, *ONE, "train.steps=20", "launcher.chain=5", f"run_dir={run_dir}",
             f"launcher.python={_python(tmp_path, 'tests.slurm.slowly')}"]  # fmt: skip
    code, text = moe_submit(jobs, *words)
    assert code == 0, text
    (place,) = (run_dir / "submissions").iterdir()
    links = json.loads((place / "submission.json").read_text())["jobs"]
    assert len(links) == 5
    jobs.wait_for_step(run_dir, 3)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", links[0])
    assert jobs.end(links[0])["ExitCode"] == "75:0", jobs.logs(links[0])
    jobs.finish(links[1])
    slurm.wait_for(lambda: jobs.cluster.run("squeue", "--noheader") == "", 60)
    assert [jobs.facts(link)["JobState"] for link in links[2:]] == ["CANCELLED"] * 3
    assert sorted(path.name for path in run_dir.glob("slurm-*.out")) == [f"slurm-{link}.out" for link in links[:2]]
    assert len(losses(run_dir)) == 20


def test_a_second_job_in_the_same_run_dir_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    """In one line that names who has it, and without another try; the first job goes on."""
    run_dir = tmp_path / "run"
    slow = _python(tmp_path, "tests.slurm.slowly")
    first = jobs.submit(run_dir, steps=60, MOE_PYTHON=slow)
    jobs.wait_for_step(run_dir, 2)
    second = jobs.submit(run_dir, steps=60, MOE_PYTHON=slow)
    facts = jobs.end(second)
    output = (tmp_path / f"slurm-{second}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), output
    assert output.count(", attempt ") == 1, output
    (told,) = {line for line in output.splitlines() if line.startswith("error: ") and "in use" in line}
    assert re.search(rf"is in use by process \d+ on node\d \(Slurm job {first}\)", told), told
    assert jobs.facts(first)["JobState"] == "RUNNING", jobs.logs(first)
    jobs.finish(first)
    assert len(losses(run_dir)) == 60
