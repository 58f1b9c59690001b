"""One rank of `moe-preflight`: what it asks for, when all of them end, and what rank 0 reports."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.preflight import disks, facts, measure, rank
from launch.preflight.facts import RankFacts
from launch.preflight.verdict import Finding
from launch.slurm import commands, submission
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from parallel import runtime
from parallel.errors import LaunchError
from parallel.exit_codes import ExitCode
from parallel.rank_info import RankInfo
from tests.launch.preflight.test_preflight import healthy

CPU = torch.device("cpu")


def info(number: int, world_size: int = 8) -> RankInfo:
    return RankInfo(number, world_size, number % 2, 2, "node1", 29500, "srun")


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return Config(run_dir=str(tmp_path / "new/run"))


@pytest.fixture
def gathered(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> list[RankFacts]:
    """What all ranks find; a test may break one of them."""
    ranks = healthy()
    waited: list[bool] = []

    def gather(found: list[RankFacts], own: RankFacts) -> None:
        assert own is ranks[own.rank]
        assert len(found) == len(ranks)
        found[:] = ranks

    def barrier() -> None:
        waited.append(Path(cfg.run_dir, "preflight.json").exists())

    fake = SimpleNamespace(all_gather_object=gather, barrier=barrier, waited=waited)
    monkeypatch.setattr(rank, "dist", fake)
    monkeypatch.setattr(rank, "validate", lambda cfg, world_size: world_size)
    monkeypatch.setattr(rank, "_start", lambda cfg, info: CPU)
    monkeypatch.setattr(rank, "look", lambda cfg, layout, info, device: ranks[info.rank])
    return ranks


def test_healthy_ranks_end_and_the_first_one_reports(
    cfg: Config, gathered: list[RankFacts], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        rank.run(cfg, info(number))
    assert capsys.readouterr().out == ""
    assert not Path(cfg.run_dir).exists()
    rank.run(cfg, info(0))
    text = capsys.readouterr().out
    assert text.startswith("preflight of 8 ranks on 4 nodes\n")
    assert len(text.splitlines()) == 9
    assert Path(cfg.run_dir, "preflight.txt").read_text() == text
    result = json.loads(Path(cfg.run_dir, "preflight.json").read_text())
    assert (result["exclude"], result["suspects"], result["findings"]) == ([], [], [])
    assert [found["rank"] for found in result["ranks"]] == list(range(8))


def test_every_rank_ends_with_the_same_code_after_the_report(cfg: Config, gathered: list[RankFacts]) -> None:
    gathered[5].gpu_problems = ["NVLink down: Link 3"]
    for number in (0, 5):
        with pytest.raises(SystemExit) as ended:
            rank.run(cfg, info(number))
        assert ended.value.code == ExitCode.BAD_NODE
    assert rank.dist.waited == [True, True]  # type: ignore[attr-defined]


def test_the_report_names_nodes_and_suspects(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("links", "n2", "1.00 GB/s to its neighbours, the median is 40.00"),
        Finding("bandwidth", "", "dp group of rank 1: slow", ("n1", "n3")),
    ]
    rank._report(cfg, healthy(), findings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "exclude: n2", "submit again with: sbatch --exclude=n2 ...", "suspects, not excluded: n1,n3"
    ]  # fmt: skip
    result = json.loads(Path(cfg.run_dir, "preflight.json").read_text())
    assert (result["exclude"], result["suspects"]) == (["n2"], ["n1", "n3"])
    assert [found["text"] for found in result["findings"]] == [finding.text for finding in findings]


def test_the_report_tells_what_to_do_where_no_node_is_to_blame(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    rank._report(cfg, healthy(), [Finding("storage", "", "run_dir cannot be written: No space left on device")])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no single node is to blame: make space, or set other directories"
    )


def test_the_report_has_no_empty_lists(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    rank._report(cfg, healthy(), [Finding("bandwidth", "", "dp group of rank 1: slow", ("n1", "n3"))])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "no single node is to blame: see the switches between them", "suspects, not excluded: n1,n3"
    ]  # fmt: skip
    rank._report(cfg, healthy(), [Finding("clock", "n2", "+60.0 s against the other nodes")])
    assert capsys.readouterr().out.splitlines()[-1] == "submit again with: sbatch --exclude=n2 ..."


def test_a_report_that_cannot_be_written_is_shown(
    cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").touch()
    rank._report(cfg, healthy(), [])
    shown = capsys.readouterr()
    assert shown.out.startswith("preflight of 8 ranks on 4 nodes\n")
    assert shown.err == f"warning: {cfg.run_dir}/preflight.json cannot be written: Not a directory\n"


@pytest.fixture
def submitted(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Within a job that moe-submit has started with launcher.preflight=resubmit; returns its record."""
    place = Path(cfg.run_dir, submission.FOLDER, "2026-01-01_00-00-00")
    place.mkdir(parents=True)
    submission.write(submission.Submission(["sbatch", "--parsable", "train.sbatch"], {}, ["70"]), place)
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    monkeypatch.setenv("MOE_SUBMITTED", place.name)
    cfg.launcher.preflight = "resubmit"
    return place


def test_the_third_job_is_the_last_that_is_submitted_again(
    cfg: Config, submitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[tuple[str, ...], str]] = []

    def run(*words: str, environment: dict[str, str]) -> str:
        given.append((words, environment["MOE_PREFLIGHT_ROUND"]))
        return "71;cluster\n"

    monkeypatch.setattr(commands, "run", run)
    for round_, told in ((2, "submitted again as 71 with --exclude=n1"), (3, "not submitted again: that was done 3")):
        monkeypatch.setenv("MOE_PREFLIGHT_ROUND", str(round_))
        assert rank._again(cfg, ["n1"]).startswith(told)
    assert given == [(("sbatch", "--parsable", "--exclude=n1", "train.sbatch"), "3")]


def test_a_job_that_slurm_does_not_take_is_told(cfg: Config, submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str, environment: dict[str, str]) -> str:
        raise LaunchError("sbatch: Unable to contact slurm controller", "try later")

    monkeypatch.setattr(commands, "run", run)
    before = (submitted / submission.FACTS).read_text()
    assert rank._again(cfg, ["n1"]) == "not submitted again: sbatch: Unable to contact slurm controller"
    assert (submitted / submission.FACTS).read_text() == before


def test_outside_a_job_nothing_is_submitted(cfg: Config, submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    cfg.launcher.exclude = ["n7", "n1"]
    assert rank._again(cfg, ["n2", "n1"]) == "submit again with: moe-submit ... 'launcher.exclude=[n1,n2,n7]'"


@pytest.mark.parametrize("given", [None, "2000"])
def test_ranks_on_cpus_meet_without_megatron(given: str | None, cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the recorder of collectives, unless the user has asked for it."""
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", given)
    joined: list[dict[str, Any]] = []
    fake = SimpleNamespace(init_process_group=lambda backend, **more: joined.append({"backend": backend} | more))
    monkeypatch.setattr(rank, "dist", fake)
    cfg.runtime, cfg.launcher.timeout_s = "cpu", 77
    assert rank._start(cfg, info(3)) == CPU
    assert joined[0].pop("timeout").total_seconds() == 77
    assert joined == [{"backend": "gloo", "init_method": "tcp://node1:29500", "rank": 3, "world_size": 8}]
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == (given or "0")
    monkeypatch.setattr(runtime, "choose", lambda name: "cuda")
    monkeypatch.setattr(runtime, "start", lambda name, info, timeout_s: (name, info.rank, timeout_s))
    assert rank._start(cfg, info(3)) == ("cuda", 3, 77)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stands for what ranks measure; returns what was asked for, in order."""
    asked: list[tuple[object, ...]] = []

    def answer(name: str, result: object, *places: int) -> Any:
        def call(*args: object) -> object:
            asked.append((name, *(args[place] for place in places)))
            return result

        return call

    disk = disks.Disk("run_dir", "/run", True, 0, 0)
    monkeypatch.setattr(measure, "clock", answer("clock", -0.5))
    monkeypatch.setattr(measure, "storage", answer("storage", (["run_dir"], [disk]), 2))
    monkeypatch.setattr(measure, "gemm_times", answer("gemm_times", measure.GemmTimes(0.1, 0.2, 0.3, 0.4), 0))
    monkeypatch.setattr(measure, "links", answer("links", 12.5, 0, 3))
    monkeypatch.setattr(measure, "bandwidth", answer("bandwidth", {"tp": (2, 3.0, 4.0)}, 3, 4))
    monkeypatch.setattr(facts, "node_name", lambda: "n1")
    monkeypatch.setattr(facts, "versions", lambda: {"torch": "2.9"})

    def gather(found: list[str], own: str) -> None:
        found[:] = ["n0", own]

    monkeypatch.setattr(rank, "dist", SimpleNamespace(barrier=answer("barrier", None), all_gather_object=gather))
    return asked


def _two_ranks(cfg: Config) -> Config:
    cfg.parallel.dp, cfg.batch.global_batch_size, cfg.runtime, cfg.train.steps = 2, 2, "cpu", 10
    cfg.data.source, cfg.schedule.warmup_steps = "none", 0
    return cfg


def test_all_findings_of_a_rank_on_cpus(
    cfg: Config, measured: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks multiply together once all have looked at their disks, which takes some longer than others."""
    monkeypatch.setattr(facts, "memory_free", lambda: 0.25)
    layout = validate(_two_ranks(cfg), 2)
    found = rank.look(cfg, layout, info(1, 2), CPU)
    assert measured == [
        ("clock",), ("storage", 16), ("barrier",), ("gemm_times", CPU), ("links", ["n0", "n1"], 4),
        ("bandwidth", 4, cfg.launcher.timeout_s),
    ]  # fmt: skip
    assert found == RankFacts(
        "n1", 1, {"torch": "2.9"}, -0.5, memory_free=0.25, unseen=["run_dir"],
        disks=[disks.Disk("run_dir", "/run", True, 0, 0)], matmul_s=0.1, matmul_median_s=0.2, matmul_worst_s=0.3,
        waited=0.4, link_gb_s=12.5, groups={"tp": (2, 3.0, 4.0)},
    )  # fmt: skip


def test_all_findings_of_a_rank_with_a_gpu(
    cfg: Config, measured: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi is asked for the GPU of the rank by its UUID, as its number there may be another."""
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30, 40))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"abc-{device.index}"))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(facts, "gpu_problems", lambda gpu: ([f"{gpu} is hot"], {"NVLinks": "no answer"}))
    monkeypatch.setattr(facts, "gpu_driver", lambda: "570.1")
    layout = validate(_two_ranks(cfg), 2)
    found = rank.look(cfg, layout, info(1, 2), cuda)
    assert (found.gpus, found.gpu, found.memory_free) == (2, "GPU-abc-1", 0.75)
    assert (found.gpu_problems, found.gpu_unchecked) == (["GPU-abc-1 is hot"], {"NVLinks": "no answer"})
    assert found.versions == {"torch": "2.9", "driver": "570.1", "nccl": "2.27.5"}
    assert ("storage", 256) in measured
    assert ("links", ["n0", "n1"], 256) in measured
    assert ("bandwidth", 256, cfg.launcher.timeout_s) in measured
