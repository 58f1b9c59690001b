"""`moe-submit` in front of a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Jobs, losses

ONE = ("parallel.pp=1", "parallel.ep=1", "launcher.ranks_per_node=1", "train.steps=2", "launcher.time_limit_min=30")


def moe_submit(jobs: Jobs, *words: str) -> tuple[int, str]:
    """Exit code, and output with errors, of the command as a user types it."""
    environment = jobs.cluster.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-m", "launch.slurm.submit", *words],
        cwd=jobs.dir, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launcher.partition=gone"], "launcher.partition=gone is not a partition of this cluster; use"),
        (["launcher.time_limit_min=4000"], "exceeds the 2880 minutes of partition main"),
        (["launcher.nodes=5", "batch.global_batch_size=5"], "the job needs 5 nodes, and partition main has 4"),
        (["launcher.gpus_per_node=9"], "launcher.gpus_per_node=9 exceeds the 8 GPUs of a node"),
        (["launcher.exclude=['node[1-4]']"], "Slurm refuses the job: sbatch: "),
        (["--dry-run", "launcher.constraint=nowhere"], "Slurm refuses the job: sbatch: "),
        (["--dry-run", "launcher.reservation=gone"], "Slurm refuses the job: sbatch: "),
    ],
)
def test_what_this_cluster_cannot_run_is_refused(words: list[str], told: str, jobs: Jobs) -> None:
    code, text = moe_submit(jobs, *jobs.overrides, *ONE, "run_dir=run", *words)
    assert code == 2, text
    assert told in text
    assert jobs.cluster.run("squeue", "--noheader") == ""


def test_a_dry_run_asks_the_controller_and_leaves_nothing(jobs: Jobs) -> None:
    code, text = moe_submit(jobs, "--dry-run", *jobs.overrides, *ONE, "run_dir=run")
    assert code == 0, text
    assert "sbatch --parsable" in text
    assert "not checked" not in text
    assert jobs.cluster.run("squeue", "--noheader") == ""


def test_a_sweep_runs_from_the_code_that_was_kept(jobs: Jobs, tmp_path: Path) -> None:
    words = ["-m", *jobs.overrides, *ONE, "seed=1,2", "run_dir=sweep", "launcher.preflight=check"]
    code, text = moe_submit(jobs, *words)
    assert code == 0, text
    (place,) = (tmp_path / "sweep/submissions").iterdir()
    # Whatever is edited while jobs wait: they run what was submitted.
    (place / "code/launch/__init__.py").write_text("print('this copy ran')\n")
    (job,) = json.loads((place / "submission.json").read_text())["jobs"]
    for number in range(2):
        jobs.finish(f"{job}_{number}")
        run_dir = tmp_path / f"sweep/{number}"
        assert len(losses(run_dir)) == 2
        assert f"seed: {number + 1}\n" in (run_dir / "config.yaml").read_text()
        assert "preflight of 1 ranks on 1 nodes" in (run_dir / "preflight.txt").read_text()
        assert "this copy ran" in jobs.logs(job)
    code, text = moe_submit(jobs, "status", "sweep")
    assert code == 0
    assert text.count(": completed, ") == 2, text
    assert text.count("step 2 of 2, loss ") == 2, text


@pytest.mark.slow
def test_a_job_leaves_a_bad_node_and_finishes_on_others(jobs: Jobs, tmp_path: Path) -> None:
    python = tmp_path / "python"
    bad = f'[[ $3 != launch.preflight ]] || set -- -P -m tests.slurm.bad_node "${{@:4}}"\nexec {sys.executable} "$@"\n'
    python.write_text(f"#!/usr/bin/env bash\n{bad}")
    python.chmod(0o755)
    # Cores are shared here, so only what is hundreds of times slower is slow.
    words = [*ONE, "parallel.dp=2", "launcher.preflight=resubmit", "launcher.slow_ratio=100",
             "launcher.clock_skew_s=60", f"launcher.python={python}", "run_dir=run"]  # fmt: skip
    code, text = moe_submit(jobs, *jobs.overrides, *words)
    assert code == 0, text
    (place,) = (tmp_path / "run/submissions").iterdir()
    (first,) = json.loads((place / "submission.json").read_text())["jobs"]
    assert jobs.end(first)["ExitCode"] == "3:0", jobs.logs(first)
    output = (tmp_path / f"run/slurm-{first}.out").read_text()
    assert "node1: 1% of main memory of rank 0 is free" in output
    assert "exclude: node1\n" in output
    again = json.loads((place / "submission.json").read_text())["jobs"]
    assert again[:1] == [first]
    assert len(again) == 2, output
    assert f"submitted again as {again[1]} with --exclude=node1" in output
    facts = jobs.finish(again[1])
    assert facts["ExcNodeList"] == "node1"
    assert "node1" not in jobs.cluster.run("scontrol", "show", "hostnames", facts["NodeList"]).split()
    assert len(losses(tmp_path / "run")) == 2
