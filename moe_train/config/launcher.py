"""How ranks are started, their rendezvous, and the batch job that they run in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_train.config.fields import doc


@dataclass
class FallbackLayout:
    """What differs from the run's own layout on another number of ranks: an entry of `launcher.fallbacks`.

    Each part has fields of a group of the config, by their names in it.
    """

    parallel: dict[str, Any] = doc({}, "Fields of parallel, such as {dp:64,ep:32}.")
    recompute: dict[str, Any] = doc({}, "Fields of recompute.")
    batch: dict[str, Any] = doc({}, "micro_batch_size; the global batch stays.")


@dataclass
class LauncherConfig:
    """Ranks on their nodes, and what the network and a batch job need to know."""

    threads_per_rank: int | None = doc(
        None, "Compute threads of one rank; null shares the cores evenly.", minimum=1, maximum=10_000
    )
    rendezvous_timeout_s: int = doc(
        300, "Rendezvous timeout of a batch job, seconds; allow for image pulls.", minimum=1
    )
    timeout_s: int = doc(600, "Timeout of a collective, seconds.", minimum=1)
    lock_timeout_s: float = doc(
        60, "Seconds without a heartbeat after which the run_dir lock of another machine is taken over.", minimum=5,
    )  # fmt: skip
    check_memory: bool = doc(
        True, "Refuse a model that needs more memory than this machine has available, before it is built."
    )

    ranks_per_node: int = doc(8, "Ranks of a batch job on one node, one for each GPU.", minimum=1, maximum=10_000)
    bind: str = doc(
        "none", "Keep each rank on the cores next to its GPU (numa), or on any (none).", choices=("none", "numa")
    )
    interface: str | None = doc(
        None, "Network interface of the rendezvous and of NCCL, such as eth0; null lets NCCL choose."
    )
    nics: list[str] = doc([], "InfiniBand adapters, in the order of the GPUs.")
    environment: list[str] = doc(
        [], "Environment variables of every rank, as NAME=VALUE; they override those of the shell."
    )
    scratch_dir: str | None = doc(None, "Directory on each node's own disk for caches and temporary files.")
    fallbacks: list[FallbackLayout] = doc(
        [], "Layouts for another number of ranks, in the order of trying them.",
        example="[{parallel:{dp:64,ep:32}}]",
    )  # fmt: skip

    start: str = doc(
        "srun", "Launcher of a batch job's ranks; pmi2 and pmix are srun with a rendezvous through MPI.",
        choices=("srun", "torchrun", "ft_launcher", "mpirun", "pmi2", "pmix"),
    )  # fmt: skip
    nodes: int | None = doc(None, "Nodes of the job; null means as many as the layout fills.", minimum=1)
    min_nodes: int | None = doc(
        None, "Fewest nodes on which a job may continue, with a layout that fits them; null means `nodes`.", minimum=1
    )
    gpus_per_node: int | None = doc(
        None, "GPUs requested per node; null means ranks_per_node, or none with runtime=cpu.", minimum=0
    )
    partition: str | None = doc(None, "Slurm partition; null means the default one.")
    account: str | None = doc(None, "Slurm account; null means the user's default.")
    qos: str | None = doc(None, "Slurm quality of service.")
    reservation: str | None = doc(None, "Slurm reservation.")
    constraint: str | None = doc(None, "Node features that the job requires.")
    exclude: list[str] = doc([], "Nodes to exclude.")
    dependency: str | None = doc(None, "Slurm dependency of the job, such as afterok:1234.")
    exclusive: bool = doc(True, "Reserve whole nodes.")
    cpus_per_rank: int | None = doc(
        None, "Cores requested per rank; null means Slurm's default: all of a node with `exclusive`, else usually one "
        "per rank.", minimum=1,
    )  # fmt: skip
    memory_gib: int | None = doc(
        None, "Main memory requested per node, GiB; null means all of it, which needs `exclusive`.", minimum=1
    )
    time_limit_min: int = doc(1440, "Time limit of one job, minutes.", minimum=1, maximum=1_000_000)
    grace_s: int = doc(300, "Time reserved before the limit to write a checkpoint, seconds.", minimum=10)
    requeues: int = doc(100, "Maximum number of requeues of a job.", minimum=0)
    restarts: int | None = doc(
        None, "Maximum number of restarts of the ranks in one job, after a failure; null means 3 in a batch job, and 0 "
        "where moe-train starts the ranks itself.", minimum=0,
    )  # fmt: skip
    chain: int = doc(1, "Dependent jobs to submit; each runs only if none before it completed the run.", minimum=1)
    array_limit: int | None = doc(None, "Jobs of a sweep (-m) that run concurrently; null means all.", minimum=1)
    container: str | None = doc(None, "Container image of the ranks; null means none.")
    container_runtime: str = doc("pyxis", "Container runtime.", choices=("pyxis", "apptainer"))
    mounts: list[str] = doc(
        [], "Mounts of the container, as HOST, HOST:CONTAINER or HOST:CONTAINER:FLAGS; none means the working "
        "directory of moe-submit.",
    )  # fmt: skip
    python: str | None = doc(
        None, "Python interpreter of a batch job's ranks, on every node or in the container; null means that of "
        "moe-submit, or python3 in a container.",
    )  # fmt: skip
    preflight: str = doc(
        "none", "Check nodes and network first: stop on a bad one (check), or resubmit without it (resubmit).",
        choices=("none", "check", "resubmit"),
    )  # fmt: skip
    expected_gbps: float | None = doc(
        None, "preflight: minimum bandwidth of every group (bytes of a rank's tensor per second), GB/s; null: on GPUs "
        "that of `cluster`, on CPU nodes none; 0: none.", minimum=0,
    )  # fmt: skip
    expected_fraction: float | None = doc(
        0.7, "preflight: fraction of the bandwidth in `cluster` that a group must reach; null or 0: not compared.",
        minimum=0,
    )  # fmt: skip
    slow_ratio: float = doc(1.5, "preflight: a rank is slow above this multiple of the median time.", minimum=1)
    clock_skew_s: float = doc(2.0, "preflight: maximum clock difference between two nodes, seconds.", minimum=0)
