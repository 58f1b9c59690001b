"""Ranks that torchrun, srun or mpirun started: they meet, share rank 0's config, and tell an error once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import join
from parallel.errors import LaunchError
from tests import forked
from tests.launch import programs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]


def _run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    env = programs.environment(OMP_NUM_THREADS="1", **more)
    return forked.run(command, cwd=programs.ROOT, env=env, capture_output=True, text=True, timeout=90)


def _srun(command: list[str], *, ports: tuple[str, str] = ("", ""), **more: str) -> list[tuple[int, str, str]]:
    """What two tasks of a real srun see, each with its own of `ports` of srun. Returns exit code, output and errors of
    each."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    tasks = []
    for i in range(2):
        env = programs.environment(
            SLURM_JOB_ID="9", SLURM_STEP_ID="0", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), SLURM_NTASKS="2",
            SLURM_STEP_NUM_TASKS="2", SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="2", SLURM_JOB_NODELIST="localhost",
            MASTER_PORT=str(port), SLURM_STEP_LAUNCHER_PORT=ports[i], **more,
        )  # fmt: skip
        pipe = subprocess.PIPE
        tasks.append(forked.Popen(command, cwd=programs.ROOT, env=env, stdout=pipe, stderr=pipe, text=True))
    try:
        ends = [task.communicate(timeout=90) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, *end) for task, end in zip(tasks, ends, strict=True)]


def _facts(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads((run_dir / f"rank_{i}.json").read_text()) for i in range(2)]


def test_torchrun(tmp_path: Path) -> None:
    result = _run([*TORCHRUN, *programs.arguments("report", tmp_path, 2)])
    assert result.returncode == 0, result.stderr
    assert [(f["launcher"], f["sum"], f["local"]) for f in _facts(tmp_path)] == [
        ("torchrun", 1, [i, 2]) for i in (0, 1)
    ]


def test_torchrun_tells_a_wrong_config_once(tmp_path: Path) -> None:
    result = _run([*TORCHRUN, *programs.arguments("report", tmp_path, 3)])
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "parallel.dp=3" in errors[0]
    assert "2 ranks" in errors[0]
    assert result.returncode != 0


def test_srun_shares_one_run_directory(tmp_path: Path) -> None:
    # Each task would put its own random number into run_dir.
    command = programs.arguments("report", tmp_path / "${oc.env:SLURM_PROCID}", 2, "launcher.cpus_per_rank=3")
    for code, _, errors in _srun(command):
        assert code == 0, errors
    found = [(f["launcher"], f["run_dir"], f["threads"]) for f in _facts(tmp_path / "0")]
    assert found == [("srun", f"{tmp_path}/0", 3)] * 2


def test_srun_tells_an_error_once_with_its_rank(tmp_path: Path) -> None:
    note = tmp_path / "code"
    ends = _srun(programs.arguments("fail_explained", tmp_path, 2), MOE_EXIT_CODE=str(note))
    (code0, _, errors0), (code1, _, errors1) = ends
    assert errors1.strip() == "error: rank 1: the corpus is empty; set data.path"
    assert errors0.strip() == ""
    assert (code0, code1) == (1, 2)
    assert note.read_text() == "2\n"  # for the batch script, which may see the code of the other rank


def test_ranks_leave_together(tmp_path: Path) -> None:
    """srun ends those that are left two minutes after the first, and rank 0 has a report to write."""
    ends = _srun(programs.arguments("report_late", tmp_path, 2))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert (tmp_path / "left").read_text() == "True"


def test_a_rank_that_is_told_to_stop_takes_the_others_with_it(tmp_path: Path) -> None:
    """A scheduler may reach one rank long before the others. All end with the code that says: continue later."""

    def warn() -> None:
        programs.wait_for(lambda: len(list(tmp_path.glob("hanging_*"))) == 2, 60)
        os.kill(int((tmp_path / "hanging_1").read_text()), signal.SIGUSR1)

    thread = threading.Thread(target=warn)
    thread.start()
    ends = _srun(programs.arguments("until_told", tmp_path, 2))
    thread.join()
    assert [(code, errors) for code, _, errors in ends] == [(75, ""), (75, "")]


def test_a_warning_while_data_are_made_ends_all_ranks_as_saved(tmp_path: Path) -> None:
    ends = _srun(programs.arguments("report", tmp_path, 2), TEST_WARNED_BEFORE="1")
    assert [code for code, _, _ in ends] == [75, 75], ends
    assert ends[0][2] == "stopped by SIGUSR1 before the first step; the same command continues\n"
    assert not list(tmp_path.glob("rank_*.json"))


def test_a_rank_with_other_code_is_named_and_nothing_is_built(tmp_path: Path) -> None:
    told = {"TEST_ODD_RANKS": "1", "MOE_EXIT_CODE": f"{tmp_path}/code"}
    (code0, _, errors0), (code1, _, errors1) = _srun(programs.arguments("report", tmp_path, 2), **told)
    assert (code0, code1) == (3, 3)  # starting again on these nodes would not help
    assert re.match(r"error: rank 0: code: rank 1 \(\S+\) has 0123456789ab, the others \w{12}; give every", errors0)
    assert errors1 == ""
    assert not list(tmp_path.glob("rank_*.json"))
    assert (tmp_path / "code").read_text() == "3\n"


def test_which_ranks_differ_from_most() -> None:
    same = {"node": "a", "versions": {"code": "1", "torch": "2.9"}}
    assert join.odd_ranks([same, same]) == ""
    ranks = [*[same] * 6, *[{"node": f"b{i}", "versions": {"code": "2", "torch": "2.9"}} for i in range(5)]]
    assert join.odd_ranks(ranks) == (
        "code: rank 6 (b0) has 2, rank 7 (b1) has 2, rank 8 (b2) has 2 and 2 more, the others 1"
    )
    assert join.odd_ranks([{"node": "b", "versions": {"code": "1", "torch": "2.8"}}, same, same]) == (
        "torch: rank 0 (b) has 2.8, the others 2.9"
    )


def test_a_missing_package_ends_the_job_without_another_try(tmp_path: Path) -> None:
    """Found while a rank trains, and before it can even meet the others."""
    note = tmp_path / "code"
    ends = _srun(programs.arguments("lack_a_package", tmp_path, 2), MOE_EXIT_CODE=str(note))
    (_, _, errors0), (code1, _, errors1) = ends
    assert (code1, note.read_text(), errors0) == (3, "3\n", "")
    assert re.match(r"error: rank 1: ModuleNotFoundError on \S+: No module named 'gone'; give \S+ on this", errors1)
    note.unlink()
    bare = [
        sys.executable,
        "-S",
        "-c",
        "import sys; sys.path[0] = sys.argv.pop(1); from launch import main; main.main()",
    ]
    code, _, errors = _srun([*bare, str(programs.ROOT)], MOE_EXIT_CODE=str(note))[0]
    assert (code, note.read_text()) == (3, "3\n")
    assert errors.startswith("error: ModuleNotFoundError on ")
    assert errors.count("\n") == 1


def test_ranks_that_see_one_gpu_each_must_see_different_ones() -> None:
    def found(*gpus: str) -> list[dict[str, object]]:
        return [{"node": f"n{i // 2}", "versions": {}, "gpu": gpu} for i, gpu in enumerate(gpus)]

    assert join.refusal(found("a", "b", "a", "b")) is None  # srun --gpus-per-task=1
    assert join.refusal(found("", "", "", "")) is None  # all see all of their node
    error = join.refusal(found("a", "b", "c", "c"))
    assert error is not None
    assert (error.exit_code, error.cause) == (2, "ranks 2 and 3 on n1 see one GPU, the same")


@pytest.mark.parametrize(("gpus", "named"), [(0, ""), (1, "GPU-7"), (8, "")])
def test_a_process_names_the_gpu_that_it_sees_alone(gpus: int, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-7"))
    assert join._only_gpu() == named


def test_srun_prints_the_config_once(tmp_path: Path) -> None:
    (code0, output0, _), (code1, output1, _) = _srun(programs.arguments("report", tmp_path, 2, "--cfg", "job"))
    assert (code0, code1) == (0, 0)
    assert "global_batch_size: 2" in output0
    assert output1 == ""


def test_srun_refuses_components_that_look_like_one_step(tmp_path: Path) -> None:
    """Inside a job only the port of srun differs. No layout has their number of ranks, which is not the cause."""
    command = programs.arguments("report", tmp_path, 3)
    (code0, _, errors0), (code1, _, errors1) = _srun(command, ports=("44835", "45071"))
    assert (code0, code1, errors1) == (LaunchError.exit_code, LaunchError.exit_code, "")
    assert errors0.startswith("error: this is a heterogeneous step of Slurm (rank 1 is of another component than rank ")
    assert errors0.count("\n") == 1


def test_srun_refuses_a_sweep(tmp_path: Path) -> None:
    note = tmp_path / "code"
    ends = _srun(programs.arguments("report", tmp_path, 2, "-m", "seed=1,2"), MOE_EXIT_CODE=str(note))
    (code0, _, errors0), (code1, _, errors1) = ends
    assert (code0, code1, note.read_text()) == (2, 2, "2\n")
    assert errors0.startswith("error: --multirun")
    assert errors1 == ""


def test_mpirun(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (extra `mpi`)")
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun on this machine")
    result = _run([mpirun, "-n", "2", *programs.arguments("report", tmp_path, 2)])
    assert result.returncode == 0, result.stderr
    assert [(f["launcher"], f["sum"]) for f in _facts(tmp_path)] == [("mpirun", 1)] * 2
