"""Communicators of a conversion: the ranks of an MPI job, the ranks of a training run, or a single process."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from parallel.errors import LaunchError


class Communicator(Protocol):
    """Ranks of one conversion. The methods are collective."""

    rank: int
    size: int

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""


class SingleProcess:
    """A conversion without other ranks."""

    rank, size = 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class MpiCommunicator:
    """The ranks of an MPI job, through mpi4py."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def broadcast(self, value: Any) -> Any:
        return self._communicator.bcast(value, root=0)

    def all_gather(self, value: Any) -> list[Any]:
        return list(self._communicator.allgather(value))


class TorchCommunicator:
    """The ranks of `torch.distributed`."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, value: Any) -> Any:
        box = [value]
        self._dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values


def cores(comm: Communicator) -> int:
    """This rank's share of the cores that the ranks on this machine may use, at least one. Every rank calls it."""
    mine = platform.node(), os.sched_getaffinity(0)
    here = [allowed for machine, allowed in comm.all_gather(mine) if machine == mine[0]]
    return max(1, len(set().union(*here)) // len(here))


# Rank and size in the environment, by launcher: Open MPI, hydra and Slurm's PMI-2, Slurm itself.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE")


def from_environment(env: Mapping[str, str] = os.environ) -> Communicator:
    """The MPI job that this process is a rank of, or this process alone.

    Raises:
        LaunchError: a launcher started several processes, and mpi4py is missing or does not see them: each would
            convert everything.
    """
    announced, _ = _announced(env)
    if announced == 1:
        return SingleProcess()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a launcher of another MPI, which is an error here
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{announced} processes were started, but mpi4py cannot be used: {str(error).splitlines()[0]}",
            "pip install 'moe-train[mpi]' with the MPI that the launcher belongs to, or start one process",
        ) from error
    comm = MpiCommunicator(MPI.COMM_WORLD)
    if comm.size != announced:
        raise LaunchError(
            f"{announced} processes were started, but mpi4py sees {comm.size}: it is built for another MPI",
            "use mpirun of the MPI that mpi4py is built for, or srun --mpi=pmi2",
        )
    return comm


def _announced(env: Mapping[str, str]) -> tuple[int, str]:
    """Number of ranks that a launcher says it started, and the variable with the rank; (1, "") without one."""
    sizes = [(int(env[size]), rank) for size, rank in zip(_SIZES, _RANKS, strict=True) if env.get(size, "").isdigit()]
    return max(sizes, default=(1, ""))


def rank_and_sizes(env: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Rank, number of ranks, and number of ranks on this machine, as the launcher says; (0, 1, 1) without one."""
    size, rank_name = _announced(env)
    if size == 1:
        return 0, 1, 1
    found = (re.match(r"\d+", env.get(name, "")) for name in _LOCAL_SIZES)
    local = next((int(number[0]) for number in found if number), 1)
    return int(env[rank_name]), size, min(size, local)


def is_reporting_rank(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 of its launcher, which prints the errors that all ranks have."""
    return not any(env.get(name, "0") != "0" for name in _RANKS)
