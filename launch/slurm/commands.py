"""Slurm's commands: what the cluster has, and the flags of a submission. No torch import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.slurm import container
from moe_train.config.launcher import LauncherConfig
from moe_train.config.resolve import restarts
from moe_train.config.schema import Config
from parallel.errors import ConfigError, LaunchError

SCRIPT = Path(__file__).parents[1] / "train.sbatch"
DATA_SCRIPT = SCRIPT.with_name("data.sbatch")
_UNHEARD = {"start": "MOE_START", "preflight": "MOE_PREFLIGHT", "requeues": "MOE_REQUEUES", "grace_s": "MOE_GRACE_S",
            "rendezvous_timeout_s": "MOE_RENDEZVOUS_TIMEOUT_S", "container": "MOE_CONTAINER",
            "container_runtime": "MOE_CONTAINER_RUNTIME"}  # fmt: skip
_DEFAULTS = LauncherConfig()
_AWAY = ("down", "drain", "drng", "fail", "failg", "futr", "inval", "maint", "unk")
"""States of a node, as sinfo shortens them, in which no job starts there."""


@dataclass(frozen=True)
class Partition:
    """What Slurm says of a partition.

    Args:
        name: as Slurm knows it.
        nodes: how many it has.
        away: how many of them are down, drained, in maintenance or silent.
        minutes: its longest time limit; None where there is none.
        gpus: GPUs of its largest node; None where Slurm does not manage them.
        accounts: the only ones that may use it; empty where all may.
        state: UP where jobs start.
        most_nodes: that one job may have; None where there is no such limit.
    """

    name: str
    nodes: int
    minutes: int | None
    gpus: int | None
    away: int = 0
    accounts: tuple[str, ...] = ()
    state: str = "UP"
    most_nodes: int | None = None


def installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def partitions() -> tuple[dict[str, Partition], str]:
    """All partitions by name, and the name of the default one ("" where there is none).

    Raises:
        LaunchError: Slurm does not answer.
    """
    by_name: dict[str, Partition] = {}
    default = ""
    for line in run("sinfo", "--noheader", "--all", "--format=%P|%D|%l|%G|%t").splitlines():
        name, nodes, limit, gres, node_state = line.strip().split("|")
        default = name.rstrip("*") if name.endswith("*") else default
        name = name.rstrip("*")
        gpus = re.search(r"gpu(?::[^:(,]+)?:(\d+)", gres)
        before = by_name.get(name)  # a line for each kind of node in each state
        each = max(int(gpus.group(1)) if gpus else 0, (before.gpus or 0) if before else 0)
        total = int(nodes) + (before.nodes if before else 0)
        away = int(nodes) if node_state.rstrip("*~#!%$@^-") in _AWAY or "*" in node_state else 0
        away += before.away if before else 0
        by_name[name] = Partition(name, total, minutes_of(limit), each or None, away)
    for line in run("scontrol", "show", "partition", "--oneliner").splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name, accounts = facts["PartitionName"], facts.get("AllowAccounts", "ALL")
        most = facts.get("MaxNodes", "UNLIMITED")
        if name in by_name:
            by_name[name] = replace(
                by_name[name],
                accounts=() if accounts == "ALL" else tuple(accounts.split(",")),
                state=facts.get("State", "UP"),
                most_nodes=int(most) if most.isdigit() else None,
            )
    return by_name, default


def minutes_of(limit: str) -> int | None:
    """Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS as minutes; None for infinite."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def check(cfg: Config, nodes: int, gpus: int) -> list[str]:
    """What makes the job wait. Raises ConfigError where the partition cannot run it, with what it has."""
    launcher = cfg.launcher
    known, default = partitions()
    name = launcher.partition or default
    if name not in known:
        named = f"launcher.partition={name}" if name else "launcher.partition=null, and there is no default partition"
        raise ConfigError(
            f"{named} is not a partition of this cluster" if name else named,
            f"use launcher.partition={' or '.join(list(known)[:3])}",
        )
    has = known[name]
    if has.state != "UP":
        raise ConfigError(
            f"partition {name} is {has.state}: a job there would not start", "use another launcher.partition, or wait"
        )
    if has.most_nodes is not None and nodes > has.most_nodes:
        raise ConfigError(
            f"the job needs {nodes} nodes, and partition {name} gives a job at most {has.most_nodes} (MaxNodes)",
            "use a smaller parallel.dp, pp, tp or cp, or another launcher.partition",
        )
    if nodes > has.nodes:
        raise ConfigError(
            f"the job needs {nodes} nodes, and partition {name} has {has.nodes}",
            "use a smaller parallel.dp, pp, tp or cp, or another launcher.partition",
        )
    if has.minutes is not None and launcher.time_limit_min > has.minutes:
        raise ConfigError(
            f"launcher.time_limit_min={launcher.time_limit_min} exceeds the {has.minutes} minutes of partition {name}",
            f"use launcher.time_limit_min={has.minutes}: a job that is not done goes back to the queue and continues",
        )
    if gpus and has.gpus is not None and gpus > has.gpus:
        raise ConfigError(
            f"launcher.gpus_per_node={gpus} exceeds the {has.gpus} GPUs of a node of partition {name}",
            f"use launcher.ranks_per_node={has.gpus} launcher.gpus_per_node={has.gpus}",
        )
    if gpus and has.gpus is None:
        raise ConfigError(
            f"launcher.gpus_per_node={gpus}, and no node of partition {name} has a GPU",
            "use another launcher.partition, or runtime=cpu",
        )
    if has.accounts and launcher.account not in has.accounts:
        given = "null" if launcher.account is None else launcher.account
        raise ConfigError(
            f"launcher.account={given} may not use partition {name}",
            f"use launcher.account={' or '.join(has.accounts[:3])}",
        )
    lacking = (launcher.min_nodes or nodes) - (has.nodes - has.away)
    if lacking <= 0:
        return []
    why = f"{has.away} of the {has.nodes} nodes of partition {name} are down, drained, in maintenance or silent"
    return [f"{why}: the job waits until {lacking} of them {'is' if lacking == 1 else 'are'} back"]


def flags(cfg: Config, nodes: int, gpus: int, run_dir: Path) -> list[str]:
    """Flags of sbatch for one job."""
    launcher = cfg.launcher
    fewest = launcher.min_nodes or nodes
    chained = launcher.chain > 1
    options = [
        f"--job-name=moe-{cfg.model.name}",
        f"--nodes={nodes}" if fewest == nodes else f"--nodes={fewest}-{nodes}",
        f"--ntasks-per-node={launcher.ranks_per_node}",
        f"--gpus-per-node={gpus}",
        f"--time={launcher.time_limit_min}",
        f"--signal=B:USR1@{launcher.grace_s}",
        "--requeue" if launcher.requeues and not chained else "--no-requeue",
        f"--output={no_pattern(run_dir)}/slurm-%j.out",
    ]
    return options + _requests(launcher)


def data_flags(cfg: Config, directory: Path) -> list[str]:
    """Flags of sbatch for a job that makes the dataset in `directory`: one task on each node."""
    launcher = cfg.launcher
    options = [
        f"--job-name=moe-data-{cfg.data.name}",
        f"--nodes={launcher.nodes or 1}",
        "--ntasks-per-node=1",
        f"--time={launcher.time_limit_min}",
        f"--signal=B:USR1@{launcher.grace_s}",
        "--requeue" if launcher.requeues else "--no-requeue",
        f"--output={no_pattern(directory)}/slurm-%j.out",
    ]
    return options + _requests(launcher)


def _requests(launcher: LauncherConfig) -> list[str]:
    """Flags of sbatch about where a job runs."""
    options = [
        "--exclusive" if launcher.exclusive else "--oversubscribe",
        f"--mem={launcher.memory_gib}G" if launcher.memory_gib else "--mem=0",  # all: the default may be a share
    ]
    if launcher.cpus_per_rank:
        options.append(f"--cpus-per-task={launcher.cpus_per_rank}")
    for name in ("partition", "account", "qos", "reservation", "constraint"):
        if (value := getattr(launcher, name)) is not None:
            options.append(f"--{name}={value}")
    if launcher.exclude:
        options.append(f"--exclude={','.join(launcher.exclude)}")
    return options


def no_pattern(directory: Path) -> str:
    """A directory as sbatch takes it in --output, where % begins a pattern such as %j."""
    return str(directory).replace("%", "%%")


def environment(cfg: Config, place: Path, counts: Sequence[int]) -> dict[str, str]:
    """Variables that `train.sbatch` reads, for the submission that is kept in `place`.

    `counts` are the numbers of nodes that have a layout, fewest first.
    """
    launcher = cfg.launcher
    result = {
        "MOE_SUBMITTED": place.name,
        "MOE_CODE": str(place / "code"),
        "MOE_PYTHON": container.python(launcher),
        "MOE_START": launcher.start,
        "MOE_PREFLIGHT": launcher.preflight,
        "MOE_RESTARTS": str(restarts(launcher, in_batch_job=True)),
        "MOE_REQUEUES": str(0 if launcher.chain > 1 else launcher.requeues),
        "MOE_GRACE_S": str(launcher.grace_s),
        "MOE_RENDEZVOUS_TIMEOUT_S": str(launcher.rendezvous_timeout_s),
    }
    if len(counts) > 1:
        result["MOE_NODE_COUNTS"] = " ".join(map(str, counts))
    return result | _container(launcher)


def data_environment(cfg: Config, place: Path) -> dict[str, str]:
    """Variables that `data.sbatch` reads, for the submission that is kept in `place`."""
    result = {
        "MOE_CODE": str(place / "code"),
        "MOE_PYTHON": container.python(cfg.launcher),
        "MOE_REQUEUES": str(cfg.launcher.requeues),
    }
    return result | _container(cfg.launcher)


def _container(launcher: LauncherConfig) -> dict[str, str]:
    if launcher.container is None:
        return {}
    mounts = ",".join(str(mount) for mount in container.mounts(launcher))
    image, runtime = launcher.container, launcher.container_runtime
    return {"MOE_CONTAINER": image, "MOE_CONTAINER_RUNTIME": runtime, "MOE_MOUNTS": mounts}


def warn_unheard(launcher: LauncherConfig) -> None:
    """One line on stderr about fields that only moe-submit acts on, where ranks run without what they ask for.

    `train.sbatch` alone sees its command line, where it refuses them, and not the files of conf.
    """
    if "MOE_SUBMITTED" in os.environ:
        return
    ignored = {}
    for name, variable in _UNHEARD.items():
        value = str(getattr(launcher, name))
        if value not in (str(getattr(_DEFAULTS, name)), os.environ.get(variable)):
            ignored[f"launcher.{name}={value}"] = variable
    if ignored:
        print(f"warning: moe-submit alone acts on {', '.join(ignored)}; launch/train.sbatch takes "
              f"{', '.join(ignored.values())}", file=sys.stderr, flush=True)  # fmt: skip


def run(*words: str, environment: dict[str, str] | None = None) -> str:
    """Output of one of Slurm's commands.

    Raises:
        LaunchError: it is not installed, fails or does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, check=False)
    except FileNotFoundError as error:
        raise LaunchError(f"{words[0]} is not on this machine", "run on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{words[0]} does not answer", "see if slurmctld is up: scontrol ping") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"{words[0]}: {lines[0].removeprefix(words[0] + ': ').removeprefix('error: ')}")
    return done.stdout
