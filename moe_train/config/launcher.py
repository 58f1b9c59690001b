"""How ranks are started, how they meet, and the batch job that they run in."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class LauncherConfig:
    """Ranks on their nodes, and what the network and a batch job need to know."""

    threads_per_rank: int | None = doc(
        None, "Compute threads of one rank; null shares the cores evenly.", minimum=1, maximum=10_000
    )
    meet_timeout_s: int = doc(
        300, "Longest that ranks of a batch job wait for each other at the start, seconds; nodes may have an image to "
        "load first.", minimum=1,
    )  # fmt: skip
    timeout_s: int = doc(600, "Longest wait of a collective operation, seconds.", minimum=1)
    lock_timeout_s: float = doc(
        60, "Time without a heartbeat after which the lock that a run on another machine left in run_dir is taken "
        "over, seconds.", minimum=5,
    )  # fmt: skip
    check_memory: bool = doc(
        True, "Refuse a model that needs more memory than this machine has available, before it is built."
    )

    ranks_per_node: int = doc(8, "Ranks of a batch job on one node, one for each GPU.", minimum=1, maximum=10_000)
    bind: str = doc(
        "none", "Keep each rank on the cores next to its GPU (numa), or on any (none).", choices=("none", "numa")
    )
    interface: str | None = doc(None, "Network interface on which ranks meet, such as eth0; null lets NCCL choose.")
    nics: list[str] = doc([], "InfiniBand adapters for traffic between ranks, in the order of the GPUs.")
    environment: list[str] = doc([], "Variables of every rank, as NAME=VALUE; they replace those of the shell.")
    scratch_dir: str | None = doc(None, "Directory on each node's own disk for caches and temporary files.")
    fallbacks: list[str] = doc(
        [], "Layouts for another number of ranks, in order, each as overrides: 'parallel.dp=64 parallel.ep=32'."
    )

    start: str = doc(
        "srun", "What starts the ranks of a batch job; pmi2 and pmix are srun with ranks that meet through MPI.",
        choices=("srun", "torchrun", "ft_launcher", "mpirun", "pmi2", "pmix"),
    )  # fmt: skip
    nodes: int | None = doc(None, "Nodes of the job; null means as many as the layout fills.", minimum=1)
    min_nodes: int | None = doc(
        None, "Fewest nodes with which a job may come back, by a layout that fits them; null means `nodes`.", minimum=1
    )
    gpus_per_node: int | None = doc(
        None, "GPUs asked of each node; null means ranks_per_node, or none with runtime=cpu.", minimum=0
    )
    partition: str | None = doc(None, "Slurm partition; null means the default one.")
    account: str | None = doc(None, "Slurm account that pays; null means the user's default.")
    qos: str | None = doc(None, "Slurm quality of service.")
    reservation: str | None = doc(None, "Slurm reservation.")
    constraint: str | None = doc(None, "Node features that Slurm must look for.")
    exclude: list[str] = doc([], "Nodes that Slurm must not use.")
    dependency: str | None = doc(None, "Slurm dependency of the job, such as afterok:1234.")
    exclusive: bool = doc(True, "Whether no other job may use the nodes.")
    cpus_per_rank: int | None = doc(
        None, "Cores asked for each rank; null means what Slurm gives: all of a node with `exclusive`, else most often "
        "one a rank.", minimum=1,
    )  # fmt: skip
    memory_gib: int | None = doc(
        None, "Main memory asked of each node, GiB; null means all of it, which needs `exclusive`.", minimum=1
    )
    time_limit_min: int = doc(1440, "Time limit of one job, minutes.", minimum=1, maximum=1_000_000)
    grace_s: int = doc(300, "Time before the limit in which a checkpoint must be written, seconds.", minimum=10)
    requeues: int = doc(100, "Most times that a job goes back to the queue to continue.", minimum=0)
    restarts: int | None = doc(
        None, "Most times that ranks are started again in one job after one has failed; null means 3 in a batch job, "
        "and 0 where moe-train starts the ranks itself.", minimum=0,
    )  # fmt: skip
    chain: int = doc(1, "Jobs submitted at once; each runs only if none before it completed the run.", minimum=1)
    array_limit: int | None = doc(None, "Jobs of a sweep (-m) that run at a time; null means all.", minimum=1)
    container: str | None = doc(None, "Container image that ranks run in; null means none.")
    container_runtime: str = doc("pyxis", "What runs the image.", choices=("pyxis", "apptainer"))
    mounts: list[str] = doc(
        [], "Directories that the container has, as HOST, HOST:CONTAINER or HOST:CONTAINER:FLAGS; none means the one "
        "in which moe-submit is called.",
    )  # fmt: skip
    python: str | None = doc(
        None, "Python that starts the ranks of a batch job, on every node or in the container; null means that of "
        "moe-submit, and python3 in a container.",
    )  # fmt: skip
    preflight: str = doc(
        "none", "Check nodes and network first: stop where one is bad (check), or submit again without it (resubmit).",
        choices=("none", "check", "resubmit"),
    )  # fmt: skip
    expected_gbps: float | None = doc(
        None, "preflight: least bandwidth of every group (bytes of a rank's tensor per second), GB/s; null: on GPUs "
        "what `cluster` gives for the group, on CPU nodes none; 0: none.", minimum=0,
    )  # fmt: skip
    expected_fraction: float | None = doc(
        0.7, "preflight: part of what `cluster` gives for a group that it must reach; null or 0: not compared.",
        minimum=0,
    )  # fmt: skip
    slow_ratio: float = doc(1.5, "preflight: a rank is slow when it takes this many times the median.", minimum=1)
    clock_skew_s: float = doc(2.0, "preflight: largest difference between the clocks of two nodes, seconds.", minimum=0)
