"""What can be known to be wrong with a submission before any node is asked for. No torch import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from launch import env
from launch.slurm import container
from launch.slurm.estimate import RunEstimate, assumptions
from moe_train.config.launcher import LauncherConfig
from moe_train.config.schema import Config
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner.placement import node_spans
from parallel.rank_info import RankInfo

_OF_ONE_MACHINE = ("/dev/shm", "/run", "/proc")
_LEAST_S = 10  # that both launcher.grace_s and launcher.rendezvous_timeout_s may be


def nodes_of(cfg: Config, layout: ParallelLayout) -> int:
    """Nodes that the layout fills. Raises ConfigError where it fills them in part."""
    each = cfg.launcher.ranks_per_node
    if layout.world_size % each:
        ranks = f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} x dp {layout.dp} = {layout.world_size} ranks"
        fits = [n for n in range(each, 0, -1) if layout.world_size % n == 0]
        raise ConfigError(
            f"parallel.{ranks} do not fill nodes of launcher.ranks_per_node={each}",
            f"use launcher.ranks_per_node={fits[0]}, or launcher.nodes=N with parallel.dp=null",
        )
    return layout.world_size // each


def job(cfg: Config) -> None:
    """Times, nodes and layouts of the batch job itself."""
    launcher = cfg.launcher
    for name in ("grace_s", "rendezvous_timeout_s"):
        if (seconds := getattr(launcher, name)) * 2 > launcher.time_limit_min * 60:
            raise ConfigError(
                f"launcher.{name}={seconds} leaves less than half of launcher.time_limit_min={launcher.time_limit_min} "
                "to train",
                f"use launcher.{name}={max(_LEAST_S, launcher.time_limit_min * 6)} or a longer launcher.time_limit_min",
            )
    here = container.python(launcher) == sys.executable  # or its libraries cannot be asked for
    if launcher.start in ("mpirun", "pmi2", "pmix") and here and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            f"launcher.start={launcher.start} needs mpi4py, which is not installed",
            "pip install 'moe-train[mpi]', or use launcher.start=srun",
        )
    if launcher.preflight == "resubmit" and launcher.chain > 1:
        raise ConfigError(
            "launcher.preflight=resubmit would start a second job in the run of the next one of launcher.chain",
            "use launcher.preflight=check, or launcher.requeues instead of launcher.chain",
        )
    if cfg.resilience.nvrx and launcher.start != "ft_launcher":
        raise ConfigError(
            f"resilience.nvrx=true needs ranks started by ft_launcher, not launcher.start={launcher.start}",
            "use launcher.start=ft_launcher or resilience.nvrx=false",
        )
    nvrx = importlib.util.find_spec("nvidia_resiliency_ext") is not None
    if launcher.start == "ft_launcher" and here and not nvrx:
        raise ConfigError(
            "launcher.start=ft_launcher needs nvidia-resiliency-ext, which is not installed",
            "pip install 'moe-train[resilience]', or use launcher.start=torchrun resilience.nvrx=false",
        )
    if not launcher.exclusive and launcher.memory_gib is None:
        raise ConfigError(
            "launcher.exclusive=false asks for all memory of nodes that other jobs may use (launcher.memory_gib=null)",
            "use launcher.memory_gib=N, of each node, or launcher.exclusive=true",
        )
    if launcher.nics and len(launcher.nics) > launcher.ranks_per_node:
        raise ConfigError(
            f"launcher.nics has {len(launcher.nics)} adapters for launcher.ranks_per_node={launcher.ranks_per_node}",
            "name one for each GPU",
        )
    env.variables(launcher, RankInfo(0, 1, 0, 1, "", 0, "srun"))  # its entries are NAME=VALUE
    container.check(launcher)


def directories(cfg: Config) -> None:
    """Other nodes will see the directories of the run, its checkpoints and its data."""
    node_local = (*_OF_ONE_MACHINE, *([cfg.launcher.scratch_dir] if cfg.launcher.scratch_dir else []))
    for name, given in _shared(cfg).items():
        place = next((place for place in node_local if _under(given, place)), None)
        if place is not None:
            raise ConfigError(
                f"{name}={given} is under {place}, which each node has for itself",
                f"set {name} to a path on storage that all nodes share",
            )


def in_container(cfg: Config) -> None:
    """The container has all paths of the run as this machine does."""
    paths = _shared(cfg) | {"run_dir": str(Path(cfg.run_dir).resolve())}  # which is how the job gets it
    paths |= {} if cfg.init_from is None else {"init_from": cfg.init_from}
    paths |= {} if cfg.resume in ("auto", "never") else {"resume": cfg.resume}
    written = {name: path for name, path in paths.items() if name in ("run_dir", "checkpoint.dir")}
    container.sees(cfg.launcher, paths, written)


def _shared(cfg: Config) -> dict[str, str]:
    """Paths by field that every node reads or writes; `checkpoint.local_dir` is each node's own."""
    paths = {"run_dir": cfg.run_dir, "checkpoint.dir": cfg.checkpoint.dir, "data.dir": cfg.data.dir}
    paths |= {"data.path": cfg.data.path, "data.cache_dir": cfg.data.cache_dir}
    paths |= {f"data.blend[{i}].path": entry.path for i, entry in enumerate(cfg.data.blend)}
    paths |= {f"data.sources[{i}].path": entry.path for i, entry in enumerate(cfg.data.sources)}
    return {name: path for name, path in paths.items() if path is not None}


def _under(path: str, place: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(place).resolve())


def notes(cfg: Config, layout: ParallelLayout, estimate: RunEstimate) -> list[str]:
    """What is allowed and most often not meant."""
    launcher, lines = cfg.launcher, []
    hours, whole = launcher.time_limit_min / 60, estimate.pace.hours if estimate.pace else 0.0
    jobs = -(-whole // hours)
    allowed, field = (launcher.requeues + 1, "requeues") if launcher.chain == 1 else (launcher.chain, "chain")
    if jobs > allowed:
        lines.append(f"the run needs about {jobs:,.0f} time limits, and {allowed:,} are allowed (launcher.{field})")
    if cfg.checkpoint.interval_steps == 0 and whole > 1:
        lines.append("a crash loses everything since the last time limit: set checkpoint.interval_steps")
    lines += [f"{name}={path} is under /tmp, which most clusters have on each node for itself"
              for name, path in _shared(cfg).items() if _under(path, "/tmp")]  # fmt: skip
    lines += assumptions(cfg, estimate)
    return lines + spans(layout, launcher.ranks_per_node)


def cores(launcher: LauncherConfig) -> list[str]:
    """Notes on the cores of shared nodes."""
    if launcher.exclusive or launcher.cpus_per_rank:
        return []
    return ["of a shared node Slurm may give each rank one core, its default: set launcher.cpus_per_rank"]


def spans(layout: ParallelLayout, ranks_per_node: int) -> list[str]:
    """Groups on several nodes that talk in every layer."""
    return [
        f"parallel.{span.name}={span.size} spans {span.nodes} nodes, and talks in every layer"
        for span in node_spans(layout, ranks_per_node)
        if span.name in ("tp", "etp") and span.nodes > 1
    ]
