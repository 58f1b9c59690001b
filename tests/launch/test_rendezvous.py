"""What a process concludes from the variables of the launcher that started it."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import pytest

from launch import rendezvous
from parallel.errors import LaunchError
from parallel.rank_info import RankInfo

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_STEP_TASKS_PER_NODE": "4,3",
}  # fmt: skip


def test_a_process_without_a_launcher_is_alone() -> None:
    assert rendezvous.detect({"PATH": "/bin"}) is None


def test_torchrun() -> None:
    assert rendezvous.detect(TORCHRUN) == RankInfo(5, 8, 1, 4, "n1", 29500, "torchrun")


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_with_a_variable_missing_names_it(name: str) -> None:
    with pytest.raises(LaunchError, match=name):
        rendezvous.detect({k: v for k, v in TORCHRUN.items() if k != name})


def test_a_rank_outside_the_job_is_refused() -> None:
    with pytest.raises(LaunchError, match="rank 8 of 8"):
        rendezvous.detect({**TORCHRUN, "RANK": "8"})


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE='many'"):
        rendezvous.detect({**TORCHRUN, "WORLD_SIZE": "many"})


def test_srun() -> None:
    info = rendezvous.detect(SRUN)
    assert info is not None
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (5, 7, 1, 3)
    assert (info.master_addr, info.launcher) == ("node3", "srun")
    assert 10_000 <= info.master_port < 30_000


HET = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "node3", "SLURM_JOB_NODELIST_HET_GROUP_1": "node4"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (HET, "SLURM_HET_SIZE=2"),  # srun --het-group=0,1, as Slurm 22.05 sets it
        ({"SLURM_STEP_TASKS_PER_NODE": "3,4"}, "3,4 tasks on its nodes"),  # srun -n3 A : -n4 B
    ],
)
def test_a_step_of_several_components_is_refused_by_name(change: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError, match="heterogeneous step of Slurm") as caught:
        rendezvous.detect({**SRUN, **change})
    assert told in str(caught.value)


def test_one_component_of_a_heterogeneous_job_is_a_step_like_any_other() -> None:
    one = {"SLURM_JOB_NODELIST": "node4", "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    info = rendezvous.detect({**SRUN, **HET, **one})
    assert info is not None
    assert (info.world_size, info.local_world_size, info.master_addr) == (7, 7, "node4")


def test_every_task_of_a_step_computes_the_same_port_and_other_steps_another() -> None:
    ports = [rendezvous.detect({**SRUN, "SLURM_PROCID": str(i)}).master_port for i in range(7)]  # type: ignore[union-attr]
    assert len(set(ports)) == 1
    other = rendezvous.detect({**SRUN, "SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.master_port != ports[0]


def test_srun_follows_a_master_set_by_hand() -> None:
    info = rendezvous.detect({**SRUN, "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4242"})
    assert info is not None
    assert (info.master_addr, info.master_port) == ("10.0.0.9", 4242)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": "4294967291"},  # the batch script
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
        {"SLURM_STEP_ID": ""},
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 in an allocation of several tasks
        {"SLURM_PTY_PORT": "40001"},  # srun --pty bash
    ],
)
def test_a_script_or_shell_in_a_slurm_job_is_no_rank(change: dict[str, str]) -> None:
    assert rendezvous.detect({**SRUN, **change}) is None


def test_a_batch_script_without_a_step_is_no_rank() -> None:
    assert rendezvous.detect({k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP")}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("a[3,7-9],b[1-2]", "a3"),
        ("login1,gpu[1-2]", "login1"),
        ("rack[2-3]node[10-12]-ib", "rack2node10-ib"),
        ("c1.example.org", "c1.example.org"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert rendezvous.first_host(nodes) == first


@pytest.mark.parametrize(
    ("per_node", "node", "count"), [("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("2", 0, 2), ("", 0, 11)]
)
def test_tasks_on_a_node(per_node: str, node: int, count: int) -> None:
    env = {"SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_NODEID": str(node)}
    assert rendezvous._tasks_on_this_node(env, 11) == count


class Communicator:
    """As much of an mpi4py communicator as is used: rank 2 of 4 on 2 nodes, which has heard from rank 0."""

    rank, size = 2, 4

    def __init__(self, size: int = 4, node_size: int = 2) -> None:
        self.size, self._node_size = size, node_size

    def Split_type(self, kind: int) -> Communicator:
        node = Communicator(self._node_size)
        node.rank = 0
        return node

    def bcast(self, value: Any, root: int) -> Any:
        assert (value is None) == (self.rank != root)
        return ("n7", 1234) if value is None else value


def test_mpirun() -> None:
    info = rendezvous._from_communicator({"PMI_SIZE": "4"}, Communicator(), 0)
    assert info == RankInfo(2, 4, 0, 2, "n7", 1234, "mpirun")


def test_mpirun_on_one_machine_meets_on_loopback_at_a_free_port() -> None:
    world = Communicator(4, 4)
    world.rank = 0
    info = rendezvous._from_communicator({"OMPI_COMM_WORLD_SIZE": "4"}, world, 0)
    assert info.master_addr == "127.0.0.1"
    assert info.master_port > 1023


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_an_mpi_that_is_not_the_launchers_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match="started 4 ranks, but mpi4py sees 1"):
        rendezvous._from_communicator({name: "4"}, Communicator(1, 1), 0)


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"mpi4py.*pip install 'moe-train\[mpi\]'"):
        rendezvous.detect({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})


def test_mpirun_in_a_slurm_job_is_not_taken_for_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_from_mpi", lambda env: RankInfo(0, 4, 0, 4, "h", 1, "mpirun"))
    info = rendezvous.detect({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"})
    assert info is not None
    assert info.launcher == "mpirun"


def test_srun_with_pmi_is_srun() -> None:
    info = rendezvous.detect({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7", "PMI_FD": "9"})
    assert info is not None
    assert info.launcher == "srun"


def test_ranks_of_srun_meet_through_mpi_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_from_mpi", lambda env, launcher, sizes: (launcher, [env[name] for name in sizes]))
    assert rendezvous.detect({**SRUN, "MOE_RENDEZVOUS": "mpi"}) == ("srun --mpi", ["7", "7"])


def test_an_srun_that_leaves_each_rank_alone_is_refused() -> None:
    sizes = ("SLURM_STEP_NUM_TASKS",)
    with pytest.raises(LaunchError, match=r"srun --mpi started 7 ranks, but mpi4py sees 1.*--mpi=pmi2"):
        rendezvous._from_communicator(SRUN, Communicator(1, 1), 0, "srun --mpi", sizes)


@pytest.mark.parametrize("variable", [rendezvous.RENDEZVOUS_TIMEOUT, rendezvous.FORMER_TIMEOUT])
def test_ranks_wait_for_the_first_as_long_as_they_are_told(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:  # takes the port, and does not answer
        listener.bind(("127.0.0.1", 0))
        info = RankInfo(1, 2, 1, 2, "127.0.0.1", listener.getsockname()[1], "srun")
        monkeypatch.setattr(os, "environ", dict(os.environ) | {variable: "1"})
        began = time.monotonic()
        with pytest.raises(LaunchError, match=r"launcher\.rendezvous_timeout_s\) above 1 where it starts later"):
            rendezvous.connect(info)
    assert time.monotonic() - began < 30


def test_one_rank_speaks() -> None:
    assert rendezvous.is_reporting_rank({})
    assert rendezvous.is_reporting_rank({"PMI_RANK": "0", "SLURM_PROCID": "3"})  # mpirun in a Slurm job
    assert not rendezvous.is_reporting_rank({"SLURM_PROCID": "3"})
