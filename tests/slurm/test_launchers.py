"""`launch/train.sbatch` on 2 nodes x 2 ranks of a real Slurm: four ways to start ranks, one result."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Jobs, losses

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or shutil.which("mpirun", path=str(Path(sys.executable).parent)) is None,
    reason="MPI is not installed here: pip install mpi4py mpich",
)


def test_srun(jobs: Jobs, undisturbed: list[float]) -> None:
    assert len(undisturbed) == 4
    assert undisturbed[0] > 5


@pytest.mark.parametrize(
    "start", ["torchrun", pytest.param("mpirun", marks=needs_mpi), pytest.param("pmi2", marks=needs_mpi)]
)
def test_every_way_to_start_ranks_gives_the_same_losses(
    start: str, jobs: Jobs, tmp_path: Path, undisturbed: list[float]
) -> None:
    job = jobs.submit(tmp_path / "run", MOE_START=start)
    jobs.finish(job)
    assert losses(tmp_path / "run") == undisturbed
    assert f"4 ranks by {start}" in (tmp_path / f"slurm-{job}.out").read_text()
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == ["node1.log", "node2.log"]


@needs_mpi
def test_ranks_that_would_each_be_alone_are_refused_in_one_line(jobs: Jobs) -> None:
    """As with srun --mpi=pmi2 and an Open MPI that has no support for it."""
    command = [sys.executable, "-P", "-m", "launch.main", *jobs.overrides]
    variables = {"MOE_RENDEZVOUS": "mpi", "PYTHONPATH": str(ROOT)}
    with pytest.raises(RuntimeError) as caught:
        jobs.cluster.run("srun", "--quiet", "-N2", "--ntasks-per-node=2", "--mpi=none", *command, **variables)
    lines = [line for line in str(caught.value).splitlines() if "error: srun --mpi" in line]
    assert len(lines) == 1, caught.value
    assert "started 4 ranks, but mpi4py sees 1" in lines[0]
    assert "use srun --mpi=pmi2 with MPICH" in lines[0]


@pytest.mark.parametrize(("first", "second"), [("-n1", "-n2"), ("-n2", "-n1"), ("-n2", "-n2")])
def test_a_heterogeneous_step_is_refused_in_one_line(first: str, second: str, jobs: Jobs) -> None:
    command = [sys.executable, "-P", "-m", "launch.main", *jobs.overrides]
    components = ["-N1", first, *command, ":", "-N1", second, *command]
    with pytest.raises(RuntimeError) as caught:
        jobs.cluster.run("srun", "--quiet", *components, PYTHONPATH=str(ROOT))
    lines = [line for line in str(caught.value).splitlines() if "error: this is a heterogeneous step" in line]
    assert len(lines) == 1, caught.value


@pytest.mark.parametrize(("first", "second"), [("-n2", "-n1"), ("-n2", "-n2")])
def test_a_heterogeneous_step_inside_a_job_is_refused_in_one_line(
    first: str, second: str, jobs: Jobs, tmp_path: Path
) -> None:
    """There no variable of Slurm has more than one component."""
    command = shlex.join([sys.executable, "-P", "-m", "launch.main", *jobs.overrides, f"run_dir={tmp_path}/run"])
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --quiet -N1 {first} {command} : -N1 {second} {command}\n")
    flags = ["--parsable", "-N2", "--ntasks-per-node=2", f"--chdir={tmp_path}", f"--output={tmp_path}/out.txt"]
    job = jobs.cluster.run("sbatch", *flags, str(script), PYTHONPATH=str(ROOT)).strip()
    jobs.end(job)
    output = (tmp_path / "out.txt").read_text()
    assert output.count("error: this is a heterogeneous step of Slurm (rank 2 is of another component") == 1, output


def test_wrong_overrides_end_the_job_at_once(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.submit(tmp_path / "run", "parallel.tp=3", "parallel.pp=1")
    facts = jobs.end(job)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert facts["ExitCode"] == "2:0", output
    assert "error: parallel.tp=3 does not divide model.num_attention_heads" in output
    assert "attempt 1" not in output
