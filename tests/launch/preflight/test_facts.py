"""What a rank of `moe-preflight` finds on its own node."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.preflight import facts

HEALTHY = ["0", "No", "No", "Not Active", "Not Active"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project, whose digest `facts.code_digest` returns."""
    for name in ("parallel/a.py", "moe_train/data/b.py", "launch/c.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    monkeypatch.setattr(facts, "code_digest", facts.code_digest.__wrapped__)
    return tmp_path


def test_versions_cover_python_code_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "apex":
            raise metadata.PackageNotFoundError(name)
        return f"1.0 of {name}"

    monkeypatch.setattr(facts.metadata, "version", version)
    found = facts.versions()
    assert found["python"] == platform.python_version()
    assert found["code"] == facts.code_digest()
    assert found["apex"] == "absent"
    for name in ("torch", "megatron-core", "transformer-engine", "tokenizers", "safetensors", "numpy", "omegaconf"):
        assert found[name] == f"1.0 of {name}"


@pytest.mark.parametrize("name", ["parallel/a.py", "moe_train/data/b.py", "launch/c.py"])
def test_the_digest_changes_with_each_file_of_the_code(name: str, code: Path) -> None:
    digests = [facts.code_digest()]
    (code / name).write_text("# another\n")
    digests.append(facts.code_digest())
    (code / name).rename((code / name).with_name("renamed.py"))
    digests.append(facts.code_digest())
    (code / name).with_name("renamed.py").unlink()
    digests.append(facts.code_digest())
    assert len(set(digests)) == 4
    assert all(len(digest) == 12 for digest in digests)


def test_the_digest_does_not_depend_on_the_file_system(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the order in which it lists files, nor on files that Python writes."""
    (code / "launch/d.py").touch()
    before = facts.code_digest()
    (code / "launch/c.pyc").touch()
    assert facts.code_digest() == before
    listed = Path.rglob
    for backwards in (False, True):
        monkeypatch.setattr(
            Path, "rglob", lambda self, pattern, order=backwards: sorted(listed(self, pattern), reverse=order)
        )
        assert facts.code_digest() == before


def test_a_node_has_the_name_that_slurm_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("gpu7", "gpu7.cluster.example.org"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert facts.node_name() == "gpu7"


def test_memory_that_the_cache_of_files_holds_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=400, available=300, free=10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert facts.memory_free() == 0.75


class Smi:
    """In place of nvidia-smi: what it answers to one question, and what it was asked."""

    def __init__(self, values: list[str], links: str = "", several: str | None = None) -> None:
        self.values, self.links, self.asked = values, links, list[tuple[str, ...]]()
        self.several = ", ".join(values) if several is None else several

    def __call__(self, *words: str) -> str:
        self.asked.append(words)
        if "nvlink" in words:
            if self.links == "timeout":
                raise subprocess.TimeoutExpired("nvidia-smi", 60)
            return self.links
        (query,) = (word.partition("=")[2].split(",") for word in words if word.startswith("--query-gpu="))
        if len(query) > 1:
            return self.several + "\n"
        value = self.values[list(facts._FIELDS).index(query[0])]
        if value == "unknown":
            raise subprocess.CalledProcessError(2, "nvidia-smi", f"\n {query[0]} is not known\nsee --help\n", "more\n")
        return value + "\n"


@pytest.mark.parametrize("position", range(5))
def test_each_field_of_a_gpu_is_read(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [*HEALTHY]
    values[position] = "Active"
    monkeypatch.setattr(facts, "_nvidia_smi", Smi(values))
    assert facts.gpu_problems(0) == ([f"{list(facts._FIELDS.values())[position]}: Active"], {})


@pytest.mark.parametrize("text", ["0", "No", "Not Active", "[N/A]", "N/A", "[Not Supported]"])
def test_what_a_gpu_does_not_have_is_no_problem(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_nvidia_smi", Smi([text] * 5))
    assert facts.gpu_problems(0) == ([], {})


def test_problems_of_the_gpu_and_of_its_links_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    links = "GPU 0: NVIDIA H800\n\t Link 0: 25.781 GB/s\n\t Link 1: Inactive\n\t Link 2: <inactive>\n"
    monkeypatch.setattr(facts, "_nvidia_smi", Smi(["3", *HEALTHY[1:]], links))
    assert facts.gpu_problems(0)[0] == ["uncorrected ECC errors: 3", "NVLink down: Link 1, Link 2"]


@pytest.mark.parametrize("several", ["0, No", "0, No, No, Not Active, Not Active, 7"])
def test_every_question_is_about_the_same_gpu(several: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the answer for all fields has another number of values, and each is asked for by itself."""
    smi = Smi(["0", "Yes", "unknown", "Not Active", "Not Active"], several=several)
    monkeypatch.setattr(facts, "_nvidia_smi", smi)
    assert facts.gpu_problems("GPU-1") == (
        ["pages that wait to be retired: Yes"],
        {"rows that could not be remapped": "remapped_rows.failure is not known"},
    )
    assert len(smi.asked) == 1 + 5 + 1
    assert all("--id=GPU-1" in words for words in smi.asked)


def test_a_question_without_an_answer_in_time_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields of the GPU have been read by then."""
    smi = Smi(["3", "unknown", "No", "Not Active", "Not Active"], links="timeout", several="")
    monkeypatch.setattr(facts, "_nvidia_smi", smi)
    problems, unchecked = facts.gpu_problems(0)
    assert problems == ["uncorrected ECC errors: 3"]
    assert unchecked == {
        "pages that wait to be retired": "retired_pages.pending is not known",
        "NVLinks": "Command 'nvidia-smi' timed out after 60 seconds",
    }


def test_a_gpu_that_reports_no_links_has_none_that_are_down() -> None:
    assert facts.dead_links("") == []
    assert facts.dead_links("GPU 0: NVIDIA H800\n\t Link 0: 25 GB/s\n\t Link 1: 25 GB/s\n") == []
