"""What `launch.slurm.checks` refuses or notes about a submission, for configs that are not composed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm import checks, container
from launch.slurm.estimate import Pace, RunEstimate
from moe_train.config.launcher import LauncherConfig
from moe_train.config.schema import BlendEntry, Config
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout

LAYOUT = ParallelLayout.resolve(tp=2, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=6)


def config(**launcher: object) -> Config:
    """Of a submission with these fields of `launcher`."""
    cfg = Config(run_dir="/shared/run")
    cfg.data.dir = "/shared/data"
    for name, value in launcher.items():
        assert hasattr(cfg.launcher, name)
        setattr(cfg.launcher, name, value)
    return cfg


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules that this Python has; the test chooses which."""
    names: set[str] = set()

    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, None) if name in names else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return names


def test_a_layout_fills_its_nodes() -> None:
    assert checks.nodes_of(config(ranks_per_node=4), LAYOUT) == 3
    assert checks.nodes_of(config(ranks_per_node=12), LAYOUT) == 1
    for each, fits in ((8, 6), (5, 4), (7, 6), (24, 12)):
        with pytest.raises(ConfigError, match=rf"= 12 ranks do not fill .*; use launcher\.ranks_per_node={fits}, or"):
            checks.nodes_of(config(ranks_per_node=each), LAYOUT)
    prime = ParallelLayout.resolve(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=7)
    with pytest.raises(ConfigError, match=r"use launcher\.ranks_per_node=1, or"):
        checks.nodes_of(config(ranks_per_node=2), prime)


@pytest.mark.parametrize("name", ["grace_s", "rendezvous_timeout_s"])
@pytest.mark.parametrize("minutes", [1, 10])
def test_at_least_half_of_a_job_is_left_to_train(name: str, minutes: int) -> None:
    """The remedy is a value that the field may have, and that passes."""
    other = "rendezvous_timeout_s" if name == "grace_s" else "grace_s"
    half = minutes * 30
    checks.job(config(**{name: half, other: 10}, time_limit_min=minutes))
    remedy = max(10, minutes * 6)
    with pytest.raises(ConfigError, match=rf"launcher\.{name}={half + 1} leaves .*; use launcher\.{name}={remedy} or"):
        checks.job(config(**{name: half + 1, other: 10}, time_limit_min=minutes))
    checks.job(config(**{name: remedy, other: 10}, time_limit_min=minutes))


@pytest.mark.parametrize("start", ["mpirun", "pmi2", "pmix"])
def test_starters_with_mpi_need_mpi4py_here(start: str, installed: set[str]) -> None:
    """Of another Python, or one in a container, nothing is known."""
    with pytest.raises(ConfigError, match=rf"launcher.start={start} needs mpi4py"):
        checks.job(config(start=start))
    checks.job(config(start=start, python=f"{sys.prefix}/another/python"))
    installed.add("mpi4py")
    checks.job(config(start=start))


def test_ft_launcher_needs_its_package_here(installed: set[str]) -> None:
    with pytest.raises(ConfigError, match=r"launcher.start=ft_launcher needs nvidia-resiliency-ext"):
        checks.job(config(start="ft_launcher"))
    checks.job(config(start="ft_launcher", python=f"{sys.prefix}/another/python"))
    installed.add("nvidia_resiliency_ext")
    cfg = config(start="ft_launcher")
    checks.job(cfg)
    cfg.resilience.nvrx = True
    checks.job(cfg)
    cfg.launcher.start = "torchrun"
    with pytest.raises(ConfigError, match=r"resilience.nvrx=true needs ranks started by ft_launcher"):
        checks.job(cfg)


def test_other_starters_need_no_package(installed: set[str]) -> None:
    assert installed == set()
    for start in ("srun", "torchrun"):
        checks.job(config(start=start))


def test_a_job_that_submits_itself_again_is_no_link_of_a_chain() -> None:
    for preflight in ("none", "check"):
        checks.job(config(preflight=preflight, chain=3))
    checks.job(config(preflight="resubmit", chain=1))
    with pytest.raises(ConfigError, match=r"preflight=resubmit would start a second job"):
        checks.job(config(preflight="resubmit", chain=2))


def test_memory_and_adapters_of_a_node() -> None:
    checks.job(config(exclusive=True))
    checks.job(config(exclusive=False, memory_gib=64))
    with pytest.raises(ConfigError, match=r"launcher.exclusive=false asks for all memory"):
        checks.job(config(exclusive=False))
    checks.job(config(ranks_per_node=2, nics=["mlx5_0", "mlx5_1"]))
    with pytest.raises(ConfigError, match=r"launcher.nics has 3 adapters for launcher.ranks_per_node=2"):
        checks.job(config(ranks_per_node=2, nics=["mlx5_0", "mlx5_1", "mlx5_2"]))


def test_variables_and_the_container_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"NAME=VALUE"):
        checks.job(config(environment=["NCCL_DEBUG"]))
    with pytest.raises(ConfigError, match=r"is for launcher.container"):
        checks.job(config(mounts=["/data"]))


@pytest.mark.parametrize("place", ["/dev/shm", "/run", "/proc", "/local"])
@pytest.mark.parametrize("name", ["run_dir", "checkpoint.dir", "data.dir", "data.path", "data.cache_dir", "data.blend"])
def test_what_all_nodes_read_or_write_is_on_shared_storage(name: str, place: str) -> None:
    cfg = config(scratch_dir="/local")
    checks.directories(cfg)
    given = f"{place}/work"
    if name == "run_dir":
        cfg.run_dir = given
    elif name == "data.blend":
        cfg.data.blend = [BlendEntry("/shared/a", 0.5), BlendEntry(given, 0.5)]
        name = "data.blend[1].path"
    else:
        group, _, field = name.partition(".")
        setattr(getattr(cfg, group), field, given)
    with pytest.raises(ConfigError) as refused:
        checks.directories(cfg)
    assert str(refused.value) == (
        f"{name}={given} is under {place}, which each node has for itself; set {name} to a path on storage that all "
        "nodes share"
    )


def test_a_link_counts_as_the_directory_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    for scratch, run_dir in (("scratch", "disk/run"), ("disk", "run"), ("scratch", "run")):
        cfg = config(scratch_dir=str(tmp_path / scratch))
        cfg.run_dir = str(tmp_path / run_dir)
        with pytest.raises(ConfigError, match=r"run_dir=.* is under .*, which each node has for itself"):
            checks.directories(cfg)
    cfg.run_dir = str(tmp_path / "disk2/run")
    checks.directories(cfg)


def test_the_container_is_asked_for_every_path_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
    monkeypatch.setattr(container, "sees", lambda launcher, read, written: asked.append((read, written)))
    cfg = config()
    cfg.data.path, cfg.data.cache_dir = "/shared/text", "/shared/cache"
    cfg.data.blend = [BlendEntry("/shared/blended", 2)]
    usual = {
        "run_dir": "/shared/run", "data.dir": "/shared/data", "data.path": "/shared/text",
        "data.cache_dir": "/shared/cache", "data.blend[0].path": "/shared/blended",
    }  # fmt: skip
    for resume in ("auto", "never"):
        cfg.resume = resume
        checks.in_container(cfg)
    assert asked == [(usual, {"run_dir": "/shared/run"})] * 2
    cfg.init_from, cfg.resume, cfg.checkpoint.dir = "/shared/weights", "/shared/old", "/shared/checkpoints"
    checks.in_container(cfg)
    assert asked[-1] == (
        usual | {"init_from": "/shared/weights", "resume": "/shared/old", "checkpoint.dir": "/shared/checkpoints"},
        {"run_dir": "/shared/run", "checkpoint.dir": "/shared/checkpoints"},
    )


def noted(cfg: Config, hours: float | None, layout: ParallelLayout = LAYOUT) -> list[str]:
    pace = None if hours is None else Pace(1.0, 1.0, 0.4, hours, "1f1b")
    return checks.notes(cfg, layout, RunEstimate(0, 1.0, 80.0, 1000, pace))


@pytest.mark.parametrize(
    ("launcher", "hours", "told"),
    [
        ({"requeues": 4}, 10.0, ""),
        ({"requeues": 4}, 10.5, "about 6 time limits, and 5 are allowed (launcher.requeues)"),
        ({"requeues": 0}, 2.0, ""),
        ({"requeues": 0}, 2.1, "about 2 time limits, and 1 are allowed (launcher.requeues)"),
        ({"chain": 3}, 6.0, ""),
        ({"chain": 3}, 6.5, "about 4 time limits, and 3 are allowed (launcher.chain)"),
        ({"chain": 2, "requeues": 0}, 4.0, ""),
        ({"requeues": 0}, None, ""),
    ],
)
def test_a_run_that_needs_more_jobs_than_it_gets_is_told(
    launcher: dict[str, object], hours: float | None, told: str
) -> None:
    cfg = config(time_limit_min=120, **launcher)
    cfg.checkpoint.interval_steps = 10
    assert noted(cfg, hours) == ([f"the run needs {told}"] if told else [])


def test_a_long_run_without_checkpoints_between_is_told() -> None:
    told = "a crash loses everything since the last time limit: set checkpoint.interval_steps"
    cfg = config()
    assert [noted(cfg, hours) for hours in (1.0, 1.1, None)] == [[], [told], []]
    cfg.checkpoint.interval_steps = 1
    assert noted(cfg, 1.1) == []


def test_what_is_most_often_not_meant_is_told() -> None:
    cfg = config(ranks_per_node=1)
    cfg.run_dir, cfg.data.dir = "/tmp/run", "/tmp2/data"
    cfg.precision = replace(cfg.precision, fp4="nvfp4")
    assert noted(cfg, None) == [
        "run_dir=/tmp/run is under /tmp, which most clusters have on each node for itself",
        "time and cost are those of MXFP8: NVFP4, which is faster, is not timed",
        "parallel.tp=2 spans 2 nodes, and talks in every layer",
    ]


def test_only_groups_that_talk_in_every_layer_are_told_where_they_span_nodes() -> None:
    layout = ParallelLayout.resolve(tp=2, pp=2, vpp=1, cp=1, ep=2, etp=2, dp=4)
    assert checks.spans(layout, 2) == []
    assert checks.spans(layout, 1) == [
        "parallel.tp=2 spans 2 nodes, and talks in every layer",
        "parallel.etp=2 spans 2 nodes, and talks in every layer",
    ]


def test_cores_of_shared_nodes() -> None:
    assert checks.cores(LauncherConfig()) == []
    assert checks.cores(LauncherConfig(exclusive=False, cpus_per_rank=4)) == []
    (told,) = checks.cores(LauncherConfig(exclusive=False))
    assert told.endswith("set launcher.cpus_per_rank")
