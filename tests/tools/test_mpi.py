"""`mpirun` with `moe-convert` and `moe-data`: the ranks share the files, one of them speaks, and all end alike."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.formats import communicator
from parallel.errors import LaunchError
from tests.conversion import tiny_v3
from tests.conversion.tiny_v3 import files_of
from tests.data.corpora import texts, write_txt
from tests.launch.programs import ROOT, environment

BIN = Path(sys.executable).parent
MPIRUN = str(BIN / "mpirun") if (BIN / "mpirun").exists() else shutil.which("mpirun")

needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="MPI is not installed here: pip install mpi4py mpich",
)


def mpirun(ranks: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(MPIRUN), "-n", str(ranks), str(BIN / "moe-convert"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_v3.write(tmp_path / "hf", tiny_v3.weights(), files=2)


@needs_mpi
def test_two_ranks_write_what_one_writes(hf: Path, tmp_path: Path, convert: tiny_v3.Command) -> None:
    convert.well(hf, tmp_path / "alone", "convert.file_gb=0.0003")
    done = mpirun(2, hf, tmp_path / "together", "convert.file_gb=0.0003")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1  # one rank speaks
    assert done.stdout.startswith(f"{tmp_path / 'together'}: ")
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    done = mpirun(2, "verify", tmp_path / "together")
    files = len(files_of(tmp_path / "alone")) - 1
    assert done.stdout.startswith(f"{tmp_path / 'together'}: {files} files, "), done


@needs_mpi
def test_an_error_is_printed_once_and_ends_all_ranks(hf: Path, tmp_path: Path) -> None:
    """A differing copy is found by one rank only, while it writes."""
    tensors = tiny_v3.read(hf)
    tensors["model.layers.2.shared_head.head.weight"][3] += 1
    bad = tiny_v3.write(tmp_path / "bad", tensors)
    done = mpirun(2, bad, tmp_path / "target", "convert.file_gb=0.0003")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "shared_head.head.weight differs from lm_head.weight" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "hf"]


@needs_mpi
def test_a_launcher_that_mpi4py_does_not_belong_to_is_refused(hf: Path, tmp_path: Path) -> None:
    """As Open MPI's mpirun with an mpi4py that is built for MPICH: each process is alone in its world."""
    command = [str(BIN / "moe-convert"), str(hf), str(tmp_path / "target")]
    foreign = environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
    done = subprocess.run(command, cwd=ROOT, env=foreign, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr == (
        "error: 2 processes were started, but mpi4py sees 1: it is built for another MPI; "
        "use mpirun of the MPI that mpi4py is built for, or srun --mpi=pmi2\n"
    )
    assert not (tmp_path / "target").exists()


def test_without_mpi4py_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        with pytest.raises(LaunchError, match=r"4 processes were started, but mpi4py cannot be used"):
            communicator.from_environment({name: "4"})
        assert communicator.from_environment({name: "1"}).size == 1
    assert communicator.from_environment({}).size == 1


def test_only_the_first_process_speaks_of_what_all_have() -> None:
    assert communicator.is_reporting_rank({})
    assert communicator.is_reporting_rank({"PMI_RANK": "0", "PMI_SIZE": "2"})
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        assert not communicator.is_reporting_rank({name: "1"})


@needs_mpi
def test_two_ranks_make_the_dataset_that_one_makes(tmp_path: Path) -> None:
    """And the error of any of them is printed once."""
    write_txt(tmp_path / "text", texts(300, words=2000))  # 3 MB: 3 shards
    words = ["data=text", f"data.path={tmp_path}/text", "data.tokenizer_vocab_size=300", "data.prepare_workers=1"]
    moe_data = [str(BIN / "moe-data"), *words]

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)

    assert run(*moe_data, f"data.dir={tmp_path}/alone").returncode == 0
    done = run(str(MPIRUN), "-n", "2", *moe_data, f"data.dir={tmp_path}/together")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"{tmp_path}/together: 300 documents") == 1
    for name in ("text_document.bin", "text_document.idx", "tokenizer.json"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    (tmp_path / "text" / "z.jsonl").write_text("{\n")
    done = run(str(MPIRUN), "-n", "2", *moe_data, f"data.dir={tmp_path}/wrong")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/text/z.jsonl line 1 is not JSON"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
