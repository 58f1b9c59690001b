"""`moe-preflight` on four ranks, with a fault on one of them; and its judgement of what ranks report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.preflight import facts, measure, rank, verdict
from launch.preflight.disks import Disk
from launch.preflight.facts import RankFacts
from launch.slurm import commands, submission
from moe_train.config.cluster import ClusterConfig
from moe_train.config.launcher import LauncherConfig
from moe_train.config.schema import Config
from parallel.layout import ParallelLayout
from tests import forked
from tests.launch.programs import ROOT, environment, overrides


def preflight(fault: str, run_dir: Path, *more: str) -> tuple[int, str]:
    """Exit code and output, at the ratio that is the default, although the ranks share cores with other processes."""
    command = [sys.executable, "-m", "tests.launch.preflight.faults", fault, *overrides(run_dir, 4), *more]
    done = forked.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("machine", ["none", "crowded"])
def test_healthy_ranks_pass(machine: str, tmp_path: Path) -> None:
    code, text = preflight(machine, tmp_path)
    assert code == 0, text
    lines = [line for line in text.splitlines() if not line.startswith("      note: ")]
    assert lines[0] == "preflight of 4 ranks on 4 nodes"
    assert all(line.startswith("  ok  ") for line in lines[1:]), text
    assert len(lines) == 9
    assert machine == "none" or "other processes use cores of " in text
    result = json.loads((tmp_path / "preflight.json").read_text())
    assert result["exclude"] == []
    assert all(found["groups"]["dp"][1] > 0 and found["link_gb_s"] > 0 for found in result["ranks"])
    (disk,) = result["ranks"][0]["disks"]
    assert disk["write_mb_s"] > 0 < disk["read_mb_s"]
    assert not (tmp_path / ".preflight").exists()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("version", "broken: code is 0123456789ab, elsewhere "),
        ("clock", "broken: +60.0 s against the other nodes"),
        ("slow", "broken: rank 2 takes "),
        ("stopped", "broken: rank 2 takes "),
        ("storage", "broken: run_dir there is not the directory that rank 0 sees"),
    ],
)
def test_a_fault_names_its_node(fault: str, told: str, tmp_path: Path) -> None:
    code, text = preflight(fault, tmp_path / "run")
    assert code == 3, text
    assert told in text
    assert text.count("BAD") == 1, text
    assert "exclude: broken\nsubmit again with: sbatch --exclude=broken" in text
    assert (tmp_path / "run/preflight.txt").read_text() in text


SHARED = Disk("run_dir", "/shared/run", True, 2 * 10**9, 5 * 10**9, "", 10**12, 900.0, 800.0)
LOCAL = replace(SHARED, field="checkpoint.local_dir", path="/local/run", shared=False)


def healthy(count: int = 8, per_node: int = 2) -> list[RankFacts]:
    """Ranks in tp pairs within nodes and dp groups across them."""
    return [
        RankFacts(
            f"n{i // per_node}", i, {"torch": "2.9"}, 0.001 * i, gpus=per_node, memory_free=0.99, matmul_s=0.010,
            matmul_median_s=0.010, link_gb_s=40.0 if i % per_node == 0 else None,
            disks=[SHARED] if i % per_node == 0 else [],
            groups={"tp": (i // 2 * 2, 150.0, 300.0), "dp": (i % 2, 25.0, 50.0)},
        )
        for i in range(count)
    ]  # fmt: skip


def diagnosed(ranks: list[RankFacts], **launcher: float | None) -> list[verdict.Finding]:
    return verdict.diagnose(ranks, LauncherConfig(**launcher), ClusterConfig(), 2)  # type: ignore[arg-type]


def test_nothing_is_wrong_with_healthy_ranks() -> None:
    assert diagnosed(healthy()) == diagnosed(healthy(), expected_gbps=25) == []


@pytest.mark.parametrize(
    ("change", "check", "told"),
    [
        ({"versions": {"torch": "2.8"}}, "versions", "torch is 2.8, elsewhere 2.9"),
        ({"gpus": 0}, "GPU", "rank 4 sees 0 of 2 GPUs"),
        ({"gpu_problems": ["NVLink down: Link 3"]}, "GPU", "NVLink down: Link 3"),
        ({"memory_free": 0.5}, "memory", "50% of GPU of rank 4 is free"),
        ({"unseen": ["checkpoint.dir"]}, "storage", "checkpoint.dir there is not the directory that rank 0 sees"),
        ({"matmul_s": 0.016, "matmul_median_s": 0.016}, "matmul", "rank 4 takes 1.6 times the median 10 ms"),
        ({"matmul_s": 0.100}, "matmul", "single products take 10 ms, and the process is stopped between them"),
        (
            {"disks": [SHARED, replace(LOCAL, free_bytes=10**9)]},
            "storage",
            "checkpoint.local_dir (/local/run) has 1.0 GB free, and the run soon needs 2.0 GB",
        ),
        (
            {"disks": [replace(SHARED, problem="Read-only file system")]},
            "storage",
            "run_dir (/shared/run) cannot be written: Read-only file system",
        ),
        ({"link_gb_s": 12.0}, "links", "12.00 GB/s to its neighbours, the median is 40.00"),
    ],
)
def test_what_is_wrong_with_one_rank_excludes_its_node(change: dict[str, object], check: str, told: str) -> None:
    ranks = healthy()
    ranks[4] = replace(ranks[4], **change)  # type: ignore[arg-type]
    findings = diagnosed(ranks)
    assert [(f.check, f.node) for f in findings] == [(check, "n2")]
    assert told in findings[0].text
    assert verdict.excluded(findings) == ["n2"]


def test_a_shared_directory_that_every_node_finds_full_blames_none() -> None:
    ranks = healthy()
    for f in ranks:
        f.disks = [replace(disk, free_bytes=10**9) for disk in f.disks]
    findings = diagnosed(ranks)
    assert [(f.check, f.node, f.text) for f in findings] == [
        ("storage", "", "run_dir (/shared/run) has 1.0 GB free, and the run soon needs 2.0 GB")
    ]
    assert verdict.remedy(findings) == "make space, or set other directories"
    assert "      every node: run_dir (/shared/run) has 1.0 GB free, " in "\n".join(verdict.table(ranks, findings))


def test_a_directory_that_will_be_full_before_the_end_is_a_note() -> None:
    ranks = healthy()
    ranks[2].disks = [replace(SHARED, free_bytes=4 * 10**9)]
    assert diagnosed(ranks) == []
    lines = verdict.table(ranks, [])
    assert "  ok  storage   run_dir 4.0 GB free, writes 900 and reads 800 MB/s" in lines
    assert any("4.0 GB free, and the whole run writes 5.0 GB: set checkpoint.keep_last" in line for line in lines)


def test_the_table_shows_the_slowest_of_each_kind() -> None:
    ranks = healthy()
    ranks[2].disks = [replace(SHARED, write_mb_s=100.0, read_mb_s=850.0)]
    ranks[4].disks = [replace(SHARED, write_mb_s=850.0, read_mb_s=50.0)]
    ranks[4].link_gb_s, ranks[3].memory_free, ranks[5].matmul_s = 30.0, 0.95, 0.012
    for number in (4, 5):
        ranks[number].groups["tp"] = (4, 120.0, 290.0)
    slow = "tp all-reduce 120.00 and all-to-all 290.00 GB/s"
    assert verdict.table(ranks, [])[2:] == [
        "  ok  clock     0.007 s between the first and the last",
        "  ok  GPU       2 on each node",
        "  ok  memory    95% is free where it is least",
        "  ok  storage   run_dir 1.0 TB free, writes 100 and reads 50 MB/s",
        "  ok  matmul    median 10 ms, slowest 12 ms",
        "  ok  links     slowest node 30.00 GB/s",
        f"  ok  bandwidth dp all-reduce 25.00 and all-to-all 50.00 GB/s; {slow}",
    ]
    (alone,) = healthy(1, 1)
    alone.groups, alone.link_gb_s = {}, None
    lines = verdict.table([alone], [])
    assert {"  ok  links     one node", "  ok  bandwidth one rank"} <= set(lines)


def test_ranks_that_wait_for_cores_are_compared_less_strictly() -> None:
    ranks = healthy()
    ranks[4].link_gb_s = 20.0
    assert [f.check for f in diagnosed(ranks)] == ["links"]
    ranks[3].waited = 0.5
    assert diagnosed(ranks) == []
    assert any("a rank of n1 waited 50% of the time" in line for line in verdict.table(ranks, []))
    ranks[4].link_gb_s = 10.0
    assert [f.check for f in diagnosed(ranks)] == ["links"]


def test_of_two_ranks_the_slow_one_is_found() -> None:
    """Half of its own time would be in a mean of both."""
    ranks = [replace(f, groups={}) for f in healthy(2, 1)]
    ranks[1].matmul_s = ranks[1].matmul_median_s = 0.016
    assert [(f.check, f.node) for f in diagnosed(ranks)] == [("matmul", "n1")]


def test_a_gpu_bound_to_each_rank_is_no_node_that_lost_the_others() -> None:
    ranks = healthy()
    for f in ranks:
        f.gpus = 1
    assert diagnosed(ranks) == []


def test_a_slow_clock_is_that_of_the_node_not_of_a_rank_that_was_late() -> None:
    ranks = healthy()
    ranks[5].clock_s = 9.0
    assert diagnosed(ranks) == []
    ranks[4].clock_s = 8.0
    assert [(f.check, f.node, f.text) for f in diagnosed(ranks)] == [("clock", "n2", "+8.0 s against the other nodes")]


def test_a_slow_group_blames_a_node_only_where_it_lies_within_one() -> None:
    ranks = healthy()
    for number in (4, 5):
        ranks[number].groups["tp"] = (4, 80.0, 300.0)
    for number in (1, 3, 5, 7):
        ranks[number].groups["dp"] = (1, 10.0, 50.0)
    found = diagnosed(ranks, expected_fraction=None)
    assert [(f.node, f.suspects, f.text) for f in found] == [
        ("", ("n0", "n1", "n2", "n3"), "dp group of rank 1: all-reduce 10.00 GB/s, the median is 17.50"),
        ("n2", (), "tp group of rank 4: all-reduce 80.00 GB/s, the median is 150.00"),
    ]
    assert verdict.suspected(found) == ["n0", "n1", "n2", "n3"]
    assert verdict.excluded(found) == ["n2"]


def test_suspects_are_the_nodes_that_no_healthy_group_has() -> None:
    ranks = healthy()
    for f in ranks:  # pairs of neighbouring nodes, and one more pair n0, n2
        f.groups = {"ep": ((0, 2)[f.rank // 4], 50.0, 60.0)}
    for number in (1, 5):
        ranks[number].groups["ep"] = (1, 50.0, 10.0)
    for number in (4, 6, 7):
        ranks[number].groups["ep"] = (2, 50.0, 10.0)
    found = diagnosed(ranks, expected_gbps=20)
    assert [f.suspects for f in found if "all-to-all 10" in f.text] == [("n2",), ("n2", "n3")]


def test_each_group_is_compared_with_what_the_cluster_gives_it() -> None:
    """Both groups of a dimension are slow alike, so no median tells."""
    ranks = healthy()
    for f in ranks:
        f.groups["dp"] = (f.rank % 2, 19.0, 39.0)  # 0.7 of 28.7 and 57.3 GB/s
        f.groups["tp"] = (f.rank // 2 * 2, 113.0, 220.0)  # 0.7 of 158 and 316 GB/s
    texts = [f.text for f in diagnosed(ranks)]
    assert texts[0] == (
        "dp group of rank 0: all-reduce 19.00 GB/s, the median is 19.00, expected 20.1 (70% of what cluster=h800 gives)"
    )
    assert [text.partition(" GB/s")[0] for text in texts] == [
        *(f"dp group of rank {first}: {what}" for what in ("all-reduce 19.00", "all-to-all 39.00") for first in (0, 1)),
        *(f"tp group of rank {first}: all-to-all 220.00" for first in (0, 2, 4, 6)),
    ]
    for off in (
        {"expected_fraction": None},
        {"expected_fraction": 0},
        {"expected_gbps": 0},
        {"expected_fraction": 0.6},
    ):
        assert diagnosed(ranks, **off) == []
    for f in ranks:
        f.gpus = None  # CPU nodes: only where a number is given
    assert diagnosed(ranks) == []
    assert [f.check for f in diagnosed(ranks, expected_gbps=20)] == ["bandwidth"] * 2


def test_what_a_cluster_gives_a_group() -> None:
    """By hand: 200 GB/s of NVLink and 50 of network, all of it reached."""
    cluster = ClusterConfig(domain_fraction=1.0, network_fraction=1.0, spine_fraction=0.5)
    for what, size, on_node, expected in (
        ("all-reduce", 8, 8, 200 / 1.75), ("all-to-all", 8, 8, 200 * 8 / 7), ("all-reduce", 16, 1, 50 / 1.875),
        ("all-to-all", 16, 1, 50 * 16 / 15), ("all-reduce", 16, 8, 1 / (1.75 / 200 + 1 / 400)),
        ("all-to-all", 16, 8, 1 / (7 / 16 / 200 + 8 / 16 / 50)),
    ):  # fmt: skip
        assert verdict.reachable(what, size, on_node, 2048, cluster) == pytest.approx(expected), (what, size, on_node)
    assert verdict.reachable("all-reduce", 16, 1, 4096, cluster) == pytest.approx(25 / 1.875)


def test_all_groups_of_a_rank_are_those_of_the_layout() -> None:
    layout = ParallelLayout.resolve(tp=2, pp=2, vpp=1, cp=1, ep=2, etp=1, dp=2)
    assert measure.groups_of(layout, 3) == {"tp": [2, 3], "dp": [1, 3], "pp": [3, 7], "ep": [2, 3]}


# `renamed` is a driver that no longer calls them throttle reasons.
_NVIDIA_SMI = """#!/bin/sh
case "$KIND $*" in
  silent*) exec sleep 30 ;;
  lost*) echo "Unable to determine the device handle for GPU0000:1A:00.0: GPU is lost." >&2; exit 15 ;;
  *nvlink*) [ "$KIND" != unlinked ] || exit 3; printf 'GPU 0: NVIDIA H800\\n\\t Link 0: 25.781 GB/s\\n' ;;
  renamed*throttle*) echo "Field \\"clocks_throttle_reasons.hw_slowdown\\" is not a valid field to query."; exit 2 ;;
  *total,*) echo "${ECC:-0}, No, [N/A], Not Active, Not Active" ;;
  *ecc*) echo "${ECC:-0}" ;;
  *driver*) echo 570.1 ;;
  *) echo No ;;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a command in place of nvidia-smi that behaves as `kind` says and has seen `ecc` errors."""
    program = tmp_path / "nvidia-smi"
    program.write_text(_NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def behave(kind: str, ecc: str = "0") -> None:
        monkeypatch.setenv("KIND", kind)
        monkeypatch.setenv("ECC", ecc)

    return behave


def test_what_nvidia_smi_says_of_a_gpu(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi("fine")
    assert facts.gpu_problems(0) == ([], {})
    assert facts.gpu_driver() == "570.1"
    nvidia_smi("fine", ecc="3")
    assert facts.gpu_problems(0) == (["uncorrected ECC errors: 3"], {})


def test_a_question_that_nvidia_smi_does_not_know_leaves_the_others(nvidia_smi: Callable[..., None]) -> None:
    """Another driver calls its fields otherwise: that is no fault of the node, and ECC errors still are."""
    nvidia_smi("renamed", ecc="3")
    problems, unchecked = facts.gpu_problems(0)
    assert problems == ["uncorrected ECC errors: 3"]
    assert list(unchecked) == ["clocks slowed by hardware (power or heat)", "clocks slowed by heat"]
    assert set(unchecked.values()) == {'Field "clocks_throttle_reasons.hw_slowdown" is not a valid field to query.'}
    nvidia_smi("unlinked")
    assert facts.gpu_problems(0) == ([], {"NVLinks": "nvidia-smi ends with 3"})


def test_without_an_answer_nothing_is_checked(nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("lost")
    problems, unchecked = facts.gpu_problems(0)
    assert problems == []
    assert len(unchecked) == 6
    assert all(why.endswith("GPU is lost.") for why in unchecked.values())
    monkeypatch.setattr(facts, "_PATIENCE_S", 0.1)
    nvidia_smi("silent")
    assert all("timed out after 0.1 s" in why for why in facts.gpu_problems(0)[1].values())
    assert facts.gpu_driver() == facts.UNKNOWN
    monkeypatch.setenv("PATH", "")
    problems, unchecked = facts.gpu_problems(0)
    assert problems == []
    assert len(unchecked) == 6
    assert all("No such file" in why for why in unchecked.values())


def test_what_could_not_be_checked_blames_a_node_only_where_most_could() -> None:
    ranks = healthy()
    for f in ranks:
        f.versions["driver"] = "570.1"
    for f in ranks[4:]:
        f.gpu_unchecked, f.versions["driver"] = {"NVLinks": "no answer"}, facts.UNKNOWN
    assert diagnosed(ranks) == []
    lines = verdict.table(ranks, [])
    assert "  ok  GPU       2 on each node" in lines
    assert "      note: NVLinks could not be checked on 4 of 8 ranks: no answer" in lines
    for f in ranks[5:]:
        f.gpu_unchecked = {}
    assert [(f.check, f.node, f.text) for f in diagnosed(ranks)] == [
        ("GPU", "n2", "rank 4: NVLinks could not be checked, as on most others: no answer")
    ]
    assert verdict.notes(ranks) == []


def test_links_of_a_gpu_that_are_down() -> None:
    links = "GPU 0: NVIDIA H800\n\t Link 0: 25.781 GB/s\n\t Link 1: <inactive>\n"
    assert facts.dead_links(links) == ["NVLink down: Link 1"]
    assert facts.dead_links("GPU 0: NVIDIA H800\n\t Link 0: <inactive>\n") == []  # a machine without NVLink


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A run that moe-submit has started, seen from within its job; returns what is given to Slurm from now on."""
    place = tmp_path / submission.FOLDER / "2026-01-01_00-00-00"
    place.mkdir(parents=True)
    command = ["sbatch", "--parsable", "--exclude=n7", "--nodes=2", "train.sbatch", "seed=1"]
    submission.write(submission.Submission(command, {"MOE_START": "srun"}, ["70"]), place)
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    monkeypatch.setenv("MOE_SUBMITTED", place.name)
    given: list[list[str]] = []

    def run(*words: str, environment: dict[str, str]) -> str:
        assert environment["SLURM_CONF"] == "here"
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "PMI_RANK"} & set(environment)
        given.append([*words, environment["MOE_PREFLIGHT_ROUND"], environment["MOE_START"]])
        return "71\n"

    monkeypatch.setattr(commands, "run", run)
    return given


def _config(tmp_path: Path, preflight: str = "resubmit") -> Config:
    cfg = Config(run_dir=str(tmp_path))
    cfg.launcher.preflight, cfg.launcher.exclude = preflight, ["n7"]
    return cfg


def test_a_job_is_submitted_again_without_the_bad_nodes(
    tmp_path: Path, submitted: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without the rank of the process that submits it, which the new job would take for its own."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "PMI_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_CONF", "here")
    assert rank._again(_config(tmp_path), ["n2", "n9"]) == "submitted again as 71 with --exclude=n2,n7,n9"
    assert submitted == [
        ["sbatch", "--parsable", "--exclude=n2,n7,n9", "--nodes=2", "train.sbatch", "seed=1", "1", "srun"]
    ]
    assert submission.newest(tmp_path).jobs == ["70", "71"]


def test_it_is_not_submitted_for_ever_or_unasked(
    tmp_path: Path, submitted: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "moe-submit ... 'launcher.exclude=[n2,n7]'" in rank._again(_config(tmp_path, "check"), ["n2"])
    monkeypatch.setenv("MOE_PREFLIGHT_ROUND", "3")
    assert rank._again(_config(tmp_path), ["n2"]) == "not submitted again: that was done 3 times already"
    monkeypatch.delenv("MOE_PREFLIGHT_ROUND")
    monkeypatch.setenv("MOE_SUBMITTED", "2026-01-02_00-00-00")  # of a sweep, whose record is elsewhere
    assert "moe-submit ... 'launcher.exclude=[n2,n7]'" in rank._again(_config(tmp_path), ["n2"])
    monkeypatch.delenv("MOE_SUBMITTED")  # sbatch alone, after a job of moe-submit in the same directory
    assert "sbatch --exclude=n2,n7" in rank._again(_config(tmp_path), ["n2"])
    assert submitted == []
