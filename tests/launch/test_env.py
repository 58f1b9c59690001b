"""Variables and cores of a rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import env
from moe_train.config.composition.compose import compose
from moe_train.config.launcher import LauncherConfig
from parallel.errors import ConfigError
from parallel.rank_info import RankInfo


def rank(local: int, of: int = 8) -> RankInfo:
    return RankInfo(8 + local, 16, local, of, "n1", 1234, "srun")


def test_nothing_is_set_where_nothing_is_asked() -> None:
    assert env.variables(LauncherConfig(), rank(0)) == {}


def test_adapters_go_to_all_or_by_rank_as_each_library_wants_them() -> None:
    found = env.variables(compose(["launcher=h800"]).launcher, rank(3))
    assert found["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7"
    assert found["UCX_NET_DEVICES"] == "mlx5_3:1"
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    other = env.variables(compose(["launcher=h800"]).launcher, rank(4))
    assert found["TRITON_CACHE_DIR"] != other["TRITON_CACHE_DIR"]


def test_what_is_given_by_name_wins() -> None:
    cfg = LauncherConfig(interface="ib0", environment=["NCCL_SOCKET_IFNAME=eth1", "NCCL_TOPO=a=b"])
    found = env.variables(cfg, rank(0))
    assert found == {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_TOPO": "a=b"}


@pytest.mark.parametrize("entry", ["NCCL_DEBUG", "=INFO"])
def test_an_entry_without_name_or_value_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.environment has"):
        env.variables(LauncherConfig(environment=[entry]), rank(0))


def machine(root: Path, gpus: dict[str, int], numa: dict[int, str]) -> Path:
    """proc and sys of a machine: the NUMA node of each GPU by its place on the bus, and the cores of each node."""
    for bus, node in gpus.items():
        (root / "proc/driver/nvidia/gpus" / bus).mkdir(parents=True)
        (root / "sys/bus/pci/devices" / bus).mkdir(parents=True)
        (root / "sys/bus/pci/devices" / bus / "numa_node").write_text(f"{node}\n")
    for node, cores in numa.items():
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
        (root / f"sys/devices/system/node/node{node}/cpulist").write_text(f"{cores}\n")
    return root


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("allowed")
def test_a_rank_stays_next_to_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, {"0000:3b:00.0": 1, "0000:18:00.0": 0}, {0: "0-3,8-9", 1: "4-7"})
    assert env.cores_of(rank(0), root) == {0, 1, 2, 3, 8, 9}
    assert env.cores_of(rank(1), root) == {4, 5, 6, 7}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert env.cores_of(rank(0), root) == {4, 5, 6, 7}
    # srun --gpus-per-task=1 where tasks can open their own GPU only, as number 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_STEP_GPUS", "1")
    assert env.cores_of(rank(1), root) == {4, 5, 6, 7}


@pytest.mark.usefixtures("allowed")
def test_a_gpu_whose_place_the_firmware_does_not_tell_leaves_all_cores(tmp_path: Path) -> None:
    root = machine(tmp_path, {"0000:18:00.0": -1}, {0: "0-3", 1: "4-7"})
    assert env.cores_of(rank(0), root) == set(range(16))


@pytest.mark.usefixtures("allowed")
def test_without_gpus_ranks_spread_over_the_nodes_of_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, {}, {0: "0-1", 1: "2-3"})
    assert [env.cores_of(rank(i, 4), root) for i in range(4)] == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]


@pytest.mark.usefixtures("allowed")
def test_cores_that_the_job_has_not_are_left_out(tmp_path: Path) -> None:
    assert env.cores_of(rank(0), machine(tmp_path, {}, {0: "14-20"})) == {14, 15}
    assert env.cores_of(rank(0), tmp_path / "nothing") == set(range(16))
