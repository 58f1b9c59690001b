"""What Slurm's commands say of a cluster, and what a job asks them for, at the bounds."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import commands
from launch.slurm.commands import Partition
from moe_train.config.schema import Config
from parallel.errors import ConfigError, LaunchError

SINFO = """
mixed*|3|1-00:00:00|gpu:h800:4(S:0)|mix
mixed*|5|1-00:00:00|gpu:h800:8(S:0-1),tmpdisk:100|alloc
mixed*|2|1-00:00:00|(null)|drain~
plain|4|30:00|(null)|idle~
plain|1|30:00|(null)|idle*
dark|6|infinite|gpu:8|unk*
"""
SCONTROL = """
PartitionName=mixed AllowAccounts=physics,chemistry MaxNodes=8 State=UP QoS=N/A
PartitionName=dark AllowAccounts=ALL MaxNodes=UNLIMITED State=DRAIN
PartitionName=hidden AllowAccounts=ALL MaxNodes=UNLIMITED State=UP
"""


def test_a_partition_is_the_sum_of_its_kinds_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest node decides how many GPUs a job may ask for."""
    answers = {"sinfo": SINFO, "scontrol": SCONTROL}
    monkeypatch.setattr(commands, "run", lambda *words: answers[words[0]].lstrip())
    assert commands.partitions() == (
        {
            "mixed": Partition("mixed", 10, 1440, 8, 2, ("physics", "chemistry"), "UP", 8),
            "plain": Partition("plain", 5, 30, None, 1),
            "dark": Partition("dark", 6, None, 8, 6, state="DRAIN"),
        },
        "mixed",
    )


def test_slurm_is_there_with_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands.installed() is False
    (tmp_path / "sbatch").touch(mode=0o755)
    assert commands.installed() is True


def asked(has: Partition, nodes: int, gpus: int, **launcher: Any) -> list[str]:
    """What `check` says of a job in that partition."""
    cfg = Config()
    for name, value in launcher.items():
        setattr(cfg.launcher, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "partitions", lambda: ({has.name: has}, has.name))
        return commands.check(cfg, nodes, gpus)


FULL = Partition("all", 8, 60, 4, 0, ("physics", "chemistry"), "UP", 8)
JOB = {"nodes": 8, "gpus": 4, "time_limit_min": 60, "account": "chemistry"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"nodes": 9}, "gives a job at most 8"),
        ({"gpus": 5}, "exceeds the 4 GPUs"),
        ({"gpus": 0}, ""),
        ({"time_limit_min": 61}, "exceeds the 60 minutes"),
        ({"account": None}, "launcher.account=null may not use partition all"),
        ({"account": "biology"}, "use launcher.account=physics or chemistry"),
    ],
)
def test_a_job_may_have_all_that_a_partition_offers(change: dict[str, Any], told: str) -> None:
    job = JOB | change
    if not told:
        assert asked(FULL, **job) == []
        return
    with pytest.raises(ConfigError) as error:
        asked(FULL, **job)
    assert told in str(error.value)


def test_limits_that_a_partition_does_not_have() -> None:
    free = Partition("free", 9, None, None)
    assert asked(free, nodes=9, gpus=0, time_limit_min=10**6) == []
    with pytest.raises(ConfigError, match="the job needs 10 nodes, and partition free has 9"):
        asked(free, nodes=10, gpus=0)
    with pytest.raises(ConfigError, match="no node of partition free has a GPU"):
        asked(free, nodes=1, gpus=1)


@pytest.mark.parametrize(
    ("away", "min_nodes", "told"),
    [(2, None, ""), (3, None, "waits until 1 of them is back"), (4, None, "waits until 2 of them are back"),
     (5, 4, "waits until 1 of them is back"), (4, 4, "")],
)  # fmt: skip
def test_a_job_waits_for_as_many_nodes_as_it_lacks(away: int, min_nodes: int | None, told: str) -> None:
    found = asked(Partition("worn", 8, None, None, away), nodes=6, gpus=0, min_nodes=min_nodes)
    assert [told in line for line in found] == ([True] if told else [])


def flags(nodes: int = 4, **launcher: Any) -> list[str]:
    cfg = Config()
    for name, value in launcher.items():
        setattr(cfg.launcher, name, value)
    return commands.flags(cfg, nodes, 8, Path("/runs/100%"))


def test_what_a_job_asks_for() -> None:
    plain = flags()
    assert {"--nodes=4", "--requeue", "--exclusive", "--mem=0", "--output=/runs/100%%/slurm-%j.out"} <= set(plain)
    assert not [flag for flag in plain if flag.startswith(("--cpus-per-task", "--partition", "--exclude"))]
    assert "--nodes=2-4" in flags(min_nodes=2)
    assert "--nodes=4" in flags(min_nodes=4)
    given = flags(requeues=0, partition="a", qos="b", exclude=["n1", "n2"], cpus_per_rank=6, memory_gib=64)
    assert {"--no-requeue", "--partition=a", "--qos=b", "--exclude=n1,n2", "--cpus-per-task=6", "--mem=64G"} <= set(
        given
    )


@pytest.mark.parametrize(("chain", "requeues"), [(1, "5"), (2, "0")])
def test_a_job_of_a_chain_is_not_put_back_into_the_queue(chain: int, requeues: str) -> None:
    """The next one continues the run, and two jobs in one run would write over each other."""
    cfg = Config()
    cfg.launcher.chain, cfg.launcher.requeues = chain, 5
    assert ("--requeue" in commands.flags(cfg, 1, 8, Path("run"))) == (chain == 1)
    assert ("--no-requeue" in commands.flags(cfg, 1, 8, Path("run"))) == (chain > 1)
    assert commands.environment(cfg, Path("/runs/a/submissions/b"), [1])["MOE_REQUEUES"] == requeues


@pytest.mark.parametrize(("restarts", "told"), [(None, "3"), (0, "0"), (1, "1")])
def test_the_variables_of_a_submission(restarts: int | None, told: str) -> None:
    cfg = Config()
    cfg.launcher.restarts = restarts
    found = commands.environment(cfg, Path("/runs/a/submissions/b"), [1])
    assert (found["MOE_SUBMITTED"], found["MOE_CODE"]) == ("b", "/runs/a/submissions/b/code")
    assert found["MOE_RESTARTS"] == told
    assert not {"MOE_NODE_COUNTS", "MOE_CONTAINER", "MOE_MOUNTS"} & set(found)


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo 'sbatch: error: Invalid qos' >&2; exit 1", "sh: sbatch: error: Invalid qos"),
     ("echo 'sh: error: no' >&2; echo more >&2; exit 1", "sh: no"), ("exit 7", "sh: exit code 7")],
)  # fmt: skip
def test_a_command_that_fails_is_told_in_its_first_line(script: str, told: str) -> None:
    assert commands.run("sh", "-c", "echo fine; echo aside >&2") == "fine\n"
    with pytest.raises(LaunchError) as error:
        commands.run("sh", "-c", script)
    assert error.value.cause == told


def test_commands_that_are_missing_or_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="no-such-sinfo is not on this machine; run on a login node"):
        commands.run("no-such-sinfo")

    def silent(words: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired(words, options["timeout"])

    monkeypatch.setattr(subprocess, "run", silent)
    with pytest.raises(LaunchError, match="sinfo does not answer; see if slurmctld is up"):
        commands.run("sinfo")


@pytest.mark.parametrize(
    ("limit", "minutes"), [("2-00:00:00", 2880), ("1:30:00", 90), ("45:00", 45), ("infinite", None)]
)
def test_time_limits_of_slurm(limit: str, minutes: int | None) -> None:
    assert commands.minutes_of(limit) == minutes
