"""`launch/train.sbatch` with commands in place of Slurm's: what it starts on how many nodes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.slurm import commands
from tests.launch.programs import environment

_COMMANDS = {
    "scontrol": "printf 'node%s\\n' 1 2 3",
    "srun": 'echo "srun $* cores=$SLURM_CPUS_PER_TASK" >>"$LOG"',
    "mpirun": 'echo "$SLURM_TASKS_PER_NODE $SLURM_NNODES $SLURM_JOB_NODELIST mpirun $*" >>"$LOG"',
}
_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[1-3]"}


def batch(tmp_path: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, output and started commands of the script in a job of three nodes."""
    for name, text in _COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = _JOB | {"SLURM_SUBMIT_DIR": str(tmp_path), "LOG": str(tmp_path / "log"), **variables}
    done = subprocess.run(
        ["bash", str(commands.SCRIPT), f"run_dir={tmp_path}/run"], capture_output=True, text=True, timeout=30,
        env=environment(**job, PATH=f"{tmp_path}:{os.environ['PATH']}"),
    )  # fmt: skip
    log = tmp_path / "log"
    return done.returncode, done.stdout + done.stderr, log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("start", "told"),
    [
        ("srun", "--ntasks=4 --ntasks-per-node=2 --nodes=2 --nodelist=node1,node2 --mpi=none"),
        ("torchrun", "--nodes=2 --nodelist=node1,node2 --mpi=none --ntasks=2 --ntasks-per-node=1"),
        ("torchrun", "--nnodes=2 --nproc-per-node=2"),
        ("mpirun", "2(x2) 2 node1,node2 mpirun -n 4"),
    ],
)
def test_nodes_beyond_the_largest_layout_stay_idle(start: str, told: str, tmp_path: Path) -> None:
    code, output, log = batch(tmp_path, MOE_START=start, MOE_NODE_COUNTS="1 2 4", SLURM_NTASKS_PER_NODE="2")
    assert code == 0, output
    assert "1 of 3 nodes stay idle: the largest layout that fits needs 2" in output
    assert f"4 ranks by {start}" in output
    assert told in log


@pytest.mark.parametrize("counts", [{}, {"MOE_NODE_COUNTS": "2 3"}])
def test_all_nodes_are_used_where_they_have_a_layout(counts: dict[str, str], tmp_path: Path) -> None:
    code, output, log = batch(tmp_path, SLURM_NTASKS_PER_NODE="2", **counts)
    assert code == 0, output
    assert "idle" not in output
    assert "--ntasks=6 --ntasks-per-node=2 --mpi=none" in log


@pytest.mark.parametrize(("start", "cores"), [("srun", "6"), ("torchrun", "")])
def test_the_cores_of_a_rank_are_not_all_that_torchrun_gets(start: str, cores: str, tmp_path: Path) -> None:
    """It is one task for all ranks of its node, and older versions of srun give a task what this variable says."""
    job = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "6"}
    code, output, log = batch(tmp_path, MOE_START=start, **job)
    assert code == 0, output
    assert log.endswith(f" cores={cores}\n")


def test_fewer_nodes_than_any_layout_needs_are_refused(tmp_path: Path) -> None:
    code, output, log = batch(tmp_path, SLURM_NTASKS_PER_NODE="2", MOE_NODE_COUNTS="4 8")
    assert (code, log) == (2, "")
    assert "error: 3 nodes, and layouts for MOE_NODE_COUNTS=4 8; give --nodes=N" in output


@pytest.mark.parametrize("start", ["srun", "mpirun"])
def test_ranks_are_counted_from_the_tasks_of_the_job(start: str, tmp_path: Path) -> None:
    """Also where mpirun would fill the cores of the first node: Slurm tells it of those."""
    cores = {"SLURM_TASKS_PER_NODE": "8(x3)"}
    code, output, log = batch(tmp_path, MOE_START=start, SLURM_NTASKS="6", **cores)
    assert code == 0, output
    assert "6 ranks by" in output
    assert {"srun": "--ntasks=6 --ntasks-per-node=2", "mpirun": "2(x3) 3 node[1-3] mpirun -n 6"}[start] in log


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ({}, "0 tasks on 3 nodes"),
        ({"SLURM_NTASKS": "4"}, "4 tasks on 3 nodes"),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "8"}, "4 tasks on 3 nodes"),
    ],
)
def test_ranks_that_do_not_fill_nodes_are_refused(tasks: dict[str, str], told: str, tmp_path: Path) -> None:
    """Not rounded: some of them would be left out."""
    code, output, log = batch(tmp_path, MOE_START="mpirun", **tasks)
    assert (code, log) == (2, "")
    assert f"error: {told} do not say how many ranks a node has; give --ntasks-per-node=N and no --ntasks" in output
