"""Rank, world size and rendezvous address from the environment that torchrun, srun or mpirun set."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moe_train.config.launcher import LauncherConfig
from parallel.errors import LaunchError
from parallel.rank_info import RankInfo

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Steps in which Slurm runs a script or a shell rather than the tasks of srun (slurm/slurm.h, SLURM_BATCH_SCRIPT etc).
_STEPS_WITHOUT_TASKS = {"", "batch", "extern", "interactive", "4294967290", "4294967291", "4294967292"}
MPI_ASKED = "MOE_RENDEZVOUS"
"""With the value mpi, ranks of srun rendezvous through mpi4py (srun --mpi=pmi2, srun --mpi=pmix)."""
RENDEZVOUS_TIMEOUT = "MOE_RENDEZVOUS_TIMEOUT_S"
"""Rendezvous timeout, seconds. An environment variable, because ranks have no config before the rendezvous."""
FORMER_TIMEOUT = "MOE_MEET_S"
"""Its name in scripts for earlier versions."""
# Set by mpirun alone: Open MPI; the hydra of MPICH and Intel MPI. srun --mpi sets PMI_RANK or PMIX_RANK without them.
_MPIRUN_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "RANK", "SLURM_PROCID")
_MPIRUN_MARKS = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "HYDI_CONTROL_FD", "HYDI_CONTROL_SIZE_FD")


def detect(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Rank of this process, if a launcher started it as one of several ranks; None if it is the only one.

    Raises:
        LaunchError: the launcher's variables are incomplete, or its ranks do not see each other.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    in_step = "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "") not in _STEPS_WITHOUT_TASKS
    if env.get(MPI_ASKED) == "mpi" and in_step and not any(mark in env for mark in _MPIRUN_MARKS):
        return _from_mpi(env, "srun --mpi", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    # Before Slurm: mpirun inside a Slurm job starts its daemons by srun, so the ranks inherit variables of those.
    if any(mark in env for mark in _MPIRUN_MARKS):
        return _from_mpi(env)
    if in_step:
        return _from_srun(env)
    if "PMI_RANK" in env and "PMI_SIZE" in env:  # another launcher with PMI, such as aprun
        return _from_mpi(env)
    return None


def _from_torchrun(env: Mapping[str, str]) -> RankInfo:
    world_size = _number(env, "WORLD_SIZE")
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise LaunchError(
            f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}",
            "start with torchrun, or unset RANK and WORLD_SIZE to start the ranks on this machine",
        )
    return _checked(
        RankInfo(
            _number(env, "RANK"),
            world_size,
            _number(env, "LOCAL_RANK"),
            _number(env, "LOCAL_WORLD_SIZE", world_size),
            env["MASTER_ADDR"],
            _number(env, "MASTER_PORT"),
            "torchrun",
        )
    )


def _from_srun(env: Mapping[str, str]) -> RankInfo | None:
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    # One task, or a shell on a node (srun --pty), starts the ranks of its layout itself.
    if size == 1 or "SLURM_PTY_PORT" in env:
        return None
    _refuse_heterogeneous(env)
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if not nodes and "MASTER_ADDR" not in env:
        raise LaunchError("SLURM_JOB_NODELIST is not set in this task of srun", "set MASTER_ADDR to rank 0's host")
    # Every task computes the same port, above the well-known and below the ephemeral ones, apart for each step.
    port = 10_000 + (_number(env, "SLURM_JOB_ID", 0) * 31 + _number(env, "SLURM_STEP_ID", 0)) % 20_000
    return _checked(
        RankInfo(
            _number(env, "SLURM_PROCID"),
            size,
            _number(env, "SLURM_LOCALID"),
            _tasks_on_this_node(env, size),
            env.get("MASTER_ADDR") or first_host(nodes or ""),
            _number(env, "MASTER_PORT", port),
            "srun",
        )
    )


def _refuse_heterogeneous(env: Mapping[str, str]) -> None:
    """Raise LaunchError where this step has several components: `srun --het-group=0,1`, or `srun A : B`.

    The components of a heterogeneous job may differ in anything, and so may the programs of `srun A : B`.
    """
    components = _number(env, "SLURM_HET_SIZE", 1)
    own = [env.get(f"SLURM_JOB_NODELIST_HET_GROUP_{i}") for i in range(components)]
    # srun names the nodes of the step's components, or of its only one.
    spans = components > 1 and env.get("SLURM_JOB_NODELIST") not in own
    counts = _tasks_per_node(env)
    # Slurm fills the nodes of one component from the first on, so that a later one never has more tasks.
    mixed = counts != sorted(counts, reverse=True)
    if spans or mixed:
        layout = f"SLURM_HET_SIZE={components}" if spans else f"{','.join(map(str, counts))} tasks on its nodes"
        raise _heterogeneous(layout)


def component(env: Mapping[str, str] = os.environ) -> str:
    """What all tasks of one component of a step have in common, and no task of another.

    Inside a job the variables of `srun A : B` are those of `srun` with all their tasks, also where A and B have other
    numbers of tasks. But each component has a listener of its own in srun.
    """
    return env.get("SLURM_STEP_LAUNCHER_PORT", "")


def refuse_components(components: Sequence[str]) -> None:
    """Raise LaunchError where the `component` of each rank is not the same for all."""
    other = next((rank for rank, component in enumerate(components) if component != components[0]), None)
    if other is not None:
        raise _heterogeneous(f"rank {other} is of another component than rank 0")


def _heterogeneous(layout: str) -> LaunchError:
    return LaunchError(
        f"this is a heterogeneous step of Slurm ({layout}), and ranks must be the tasks of one component",
        "start all of them by one srun --ntasks-per-node=N, in a heterogeneous job with --het-group=I",
    )


def first_host(node_list: str) -> str:
    """First host of Slurm's compact list: "gpu[007-012,20],login1" -> "gpu007"."""
    depth = 0
    for end, char in enumerate(node_list):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            node_list = node_list[:end]
            break
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", node_list)


def _tasks_per_node(env: Mapping[str, str]) -> list[int]:
    """From Slurm's compact "4(x2),3": 4 tasks on each of two nodes and 3 on the third."""
    counts: list[int] = []
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(tasks)] * int(repeats or 1)
    return counts


def _tasks_on_this_node(env: Mapping[str, str], size: int) -> int:
    counts = _tasks_per_node(env)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else size


def is_reporting_rank(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, which prints the errors that all ranks have."""
    return next((env[name] for name in _RANKS if name in env), "0") == "0"


def _from_mpi(env: Mapping[str, str], launcher: str = "mpirun", sizes: Sequence[str] = _MPIRUN_SIZES) -> RankInfo:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{launcher} started this process, but mpi4py cannot be used: {str(error).splitlines()[0]}",
            f"pip install 'moe-train[mpi]' with the MPI that {launcher} belongs to, or start with torchrun or srun",
        ) from error
    return _from_communicator(env, MPI.COMM_WORLD, MPI.COMM_TYPE_SHARED, launcher, sizes)


def _from_communicator(
    env: Mapping[str, str], world: Any, shared: int, launcher: str = "mpirun", sizes: Sequence[str] = _MPIRUN_SIZES
) -> RankInfo:
    """From mpi4py's COMM_WORLD; `shared` is MPI.COMM_TYPE_SHARED. Every rank must call this.

    Raises:
        LaunchError: the launcher started another number of ranks (`sizes` names its variables) than the MPI of mpi4py
            sees; most often each rank would be alone in its world.
    """
    announced = next((_number(env, name) for name in sizes if name in env), 1)
    if announced != world.size:
        remedy = (
            "use srun --mpi=pmi2 with MPICH and Intel MPI, --mpi=pmix with Open MPI, or plain srun"
            if launcher != "mpirun"
            else "install mpi4py against the MPI that mpirun belongs to, or start with torchrun or srun"
        )
        raise LaunchError(
            f"{launcher} started {announced} ranks, but mpi4py sees {world.size}: it is built for another MPI", remedy
        )
    node = world.Split_type(shared)
    # A job on one machine must not depend on how its host name resolves.
    host = env.get("MASTER_ADDR") or ("127.0.0.1" if node.size == world.size else socket.gethostname())
    address = (host, _number(env, "MASTER_PORT", 0) or _free_port()) if world.rank == 0 else None
    host, port = world.bcast(address, root=0)
    return _checked(RankInfo(world.rank, world.size, node.rank, node.size, host, port, launcher))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(
            f"{name}={text!r} is not a number" if text is not None else f"{name} is not set",
            "the launcher sets it in each process that it starts",
        ) from None


def _checked(info: RankInfo) -> RankInfo:
    if not 0 <= info.rank < info.world_size:
        raise LaunchError(f"{info.launcher} calls this process rank {info.rank} of {info.world_size}")
    return info


def _raise_timeout(timeout_s: int) -> str:
    return f", or {RENDEZVOUS_TIMEOUT} (launcher.rendezvous_timeout_s) above {timeout_s} where it starts later"


def connect(info: RankInfo) -> TCPStore:
    """Connect to the store of the job, which rank 0 hosts unless torchrun does. torch finds the same store afterwards.

    The timeout is that of the environment variable `RENDEZVOUS_TIMEOUT`, here and in later requests to the store.

    Raises:
        LaunchError: the store could not be opened or reached.
    """
    from torch.distributed import TCPStore

    former = _number(os.environ, FORMER_TIMEOUT, LauncherConfig().rendezvous_timeout_s)
    timeout_s = _number(os.environ, RENDEZVOUS_TIMEOUT, former)
    os.environ.update(info.environment())
    hosts = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # multi_tenant: init_process_group in this process joins this server and does not open the port again.
        return TCPStore(
            info.master_addr,
            info.master_port,
            info.world_size,
            hosts,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        verb = "open" if hosts else "reach"
        raise LaunchError(
            f"rank {info.rank} cannot {verb} the rendezvous address {info.master_addr}:{info.master_port}: "
            f"{str(error).splitlines()[0]}",
            "set MASTER_PORT to a free port of rank 0's host, and MASTER_ADDR to an address the other hosts reach"
            + ("" if hosts else _raise_timeout(timeout_s)),
        ) from error
