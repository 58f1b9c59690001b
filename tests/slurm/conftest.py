"""A private Slurm for all tests of this folder, and jobs that train a tiny model on it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm

ROOT = Path(__file__).resolve().parents[2]
_MODEL = (
    "model=tiny", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.moe_ffn_hidden_size=16",
    "model.num_layers=2", "model.mtp_num_layers=0", "model.vocab_size=512", "parallel.pp=2", "parallel.ep=2",
    "batch.global_batch_size=4", "train.seq_length=32", "train.eval_batches=0", "schedule.warmup_steps=1",
    "runtime=cpu", "telemetry.progress=false", "telemetry.tensorboard=false", "telemetry.peak_tflops=1",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root and Slurm: `make test-slurm` runs it, `make test` does not."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """Four nodes of 8 CPUs. Afterwards no process of it is left."""
    problem = slurm.install() if os.environ.get("MOE_SLURM_INSTALL") else ""
    if problem := problem or slurm.missing():
        pytest.skip(problem)
    private = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    private.start()
    try:
        yield private
    finally:
        private.stop()
    slurm.wait_for(lambda: not private.leftovers(), 10)


class Jobs:
    """Submits `launch/train.sbatch` for a tiny model from `directory`."""

    def __init__(self, cluster: slurm.Cluster, directory: Path, data: tuple[str, ...]) -> None:
        self.cluster, self.dir, self.overrides = cluster, directory, (*data, *_MODEL)

    def submit(self, run_dir: Path, *more: str, flags: tuple[str, ...] = (), steps: int = 4, **variables: str) -> str:
        """Number of a job on 2 nodes x 2 ranks. Later overrides of `more` win."""
        environment = {
            "MOE_PYTHON": sys.executable,
            "MOE_CODE": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{self.cluster.environment()['PATH']}",
        }
        return self.cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=30",
            f"--chdir={self.dir}", *flags, str(ROOT / "launch/train.sbatch"), *self.overrides, f"train.steps={steps}",
            f"run_dir={run_dir}", *more, **(environment | variables),
        ).strip()  # fmt: skip

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, NodeList, Restarts, ..."""
        words = self.cluster.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, job: str, timeout_s: float = 240) -> dict[str, str]:
        """Wait for the end of a job. AssertionError with its logs where it is not a good one."""
        facts = self.end(job, timeout_s)
        assert facts["JobState"] == "COMPLETED", f"{facts}\n{self.logs(job)}"
        return facts

    def end(self, job: str, timeout_s: float = 240) -> dict[str, str]:
        """Wait for the end of a job, however it ends."""
        done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        try:
            slurm.wait_for(lambda: self.facts(job)["JobState"] in done, timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"job {job} did not end: {self.facts(job)}\n{self.logs(job)}") from error
        return self.facts(job)

    def logs(self, job: str) -> str:
        """Output of the script and of the ranks, the ends of them."""
        files = [self.dir / f"slurm-{job}.out", *sorted(self.dir.rglob("node*.log"))]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in files if path.exists())

    def wait_for_step(self, run_dir: Path, step: int, timeout_s: float = 240) -> float:
        """Return once the run has done this step; the time at which it was seen."""
        slurm.wait_for(lambda: len(losses(run_dir)) >= step, timeout_s)
        return time.monotonic()


def losses(run_dir: Path) -> list[float]:
    """Training loss of each step."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line["lm_loss"] for line in lines if "lm_loss" in line]


@pytest.fixture
def jobs(cluster: slurm.Cluster, tmp_path: Path, small_data: tuple[str, ...]) -> Jobs:
    """Jobs submitted from a directory of this test."""
    return Jobs(cluster, tmp_path, small_data)


@pytest.fixture(scope="session")
def undisturbed(
    cluster: slurm.Cluster, tmp_path_factory: pytest.TempPathFactory, small_data: tuple[str, ...]
) -> list[float]:
    """Losses of 4 steps through srun."""
    directory = tmp_path_factory.mktemp("undisturbed")
    jobs = Jobs(cluster, directory, small_data)
    jobs.finish(jobs.submit(directory / "run"))
    return losses(directory / "run")
