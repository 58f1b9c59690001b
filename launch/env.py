"""What a rank sets up on its node before it computes: variables of NCCL and its relatives, and the cores it stays on.

No torch import: it must happen before the libraries that read it are loaded.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moe_train.config.launcher import LauncherConfig
from parallel.errors import ConfigError
from parallel.rank_info import RankInfo


def apply(cfg: LauncherConfig, info: RankInfo) -> None:
    """Set the variables and the affinity of this process.

    Raises:
        ConfigError: `environment` has an entry without a name, the scratch directory cannot be made, or cores cannot be
            chosen here.
    """
    os.environ.update(variables(cfg, info))
    make_scratch(cfg)
    settle(cores(cfg, info))


def settle(cores: set[int] | None) -> None:
    """Stay on these cores (None: where the process may be already), with temporary files where TMPDIR now says."""
    tempfile.tempdir = None  # Python remembers the directory that it used first
    if cores is not None:
        os.sched_setaffinity(0, cores)


def make_scratch(cfg: LauncherConfig) -> None:
    """Make the user's part of the scratch directory. Raises ConfigError where that fails."""
    if cfg.scratch_dir is None:
        return
    try:
        _own(cfg.scratch_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"launcher.scratch_dir={cfg.scratch_dir} cannot be written: {error.strerror}",
            "name a directory on each node's own disk, or set launcher.scratch_dir=null",
        ) from error


def own_scratch(cfg: LauncherConfig) -> Path | None:
    """The user's part of the scratch directory; None without one."""
    return None if cfg.scratch_dir is None else _own(cfg.scratch_dir)


def _own(scratch_dir: str) -> Path:
    return Path(scratch_dir, f"moe-train-{os.getuid()}")


def cores(cfg: LauncherConfig, info: RankInfo) -> set[int] | None:
    """Cores that the rank stays on as `bind` says; None for any. Raises ConfigError where the system is not Linux."""
    if cfg.bind == "none":
        return None
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"launcher.bind={cfg.bind} needs Linux", "use launcher.bind=none")
    return cores_of(info)


def variables(cfg: LauncherConfig, info: RankInfo) -> dict[str, str]:
    """Environment that follows from the config. Entries of `environment` come last, so they win.

    Adapters: NCCL takes all of them and pairs each GPU with its nearest; NVSHMEM (DeepEP) and UCX take them by rank.
    """
    result: dict[str, str] = {}
    if cfg.interface:
        result |= {"NCCL_SOCKET_IFNAME": cfg.interface, "GLOO_SOCKET_IFNAME": cfg.interface}
    if cfg.nics:
        result["NCCL_IB_HCA"] = "=" + ",".join(cfg.nics)  # "=" asks for exact names: mlx5_1 is not mlx5_10
        result["NVSHMEM_ENABLE_NIC_PE_MAPPING"] = "1"
        result["NVSHMEM_HCA_LIST"] = ",".join(f"{nic}:1" for nic in cfg.nics)
        result["UCX_NET_DEVICES"] = f"{cfg.nics[info.local_rank % len(cfg.nics)]}:1"
    if cfg.scratch_dir is not None:
        own = _own(cfg.scratch_dir)
        result["TMPDIR"] = str(own)
        # One for each rank: they compile the same kernels at the same time.
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            result[name] = str(own / f"{name.lower()}_{info.local_rank}")
    for entry in cfg.environment:
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise ConfigError(f"launcher.environment has {entry!r}, which is not NAME=VALUE", "write NCCL_DEBUG=INFO")
        result[name] = value
    return result


def cores_of(info: RankInfo, root: Path = Path("/")) -> set[int]:
    """Cores next to this rank's GPU that the process may use; without GPUs, those of the rank's share of NUMA nodes.

    `root` is where proc and sys are mounted. All allowed cores where the kernel tells nothing.
    """
    allowed = os.sched_getaffinity(0)
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    gpus = sorted(path.name for path in (root / "proc/driver/nvidia/gpus").glob("*"))
    if not nodes:
        return allowed
    if gpus:
        bus = _visible(gpus)[info.local_rank % len(_visible(gpus))]
        text = (root / "sys/bus/pci/devices" / bus.lower() / "numa_node").read_text().strip()
        number = int(text)
        if number < 0:  # the firmware does not say; most often there is one node only
            return allowed
    else:
        number = info.local_rank * len(nodes) // info.local_world_size
    near = _cores((root / f"sys/devices/system/node/node{number}/cpulist").read_text())
    return near & allowed or allowed


def _visible(gpus: list[str]) -> list[str]:
    """The GPUs, in the order of the bus, that CUDA_VISIBLE_DEVICES leaves by number."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    of_step = os.environ.get("SLURM_STEP_GPUS", "").split(",")
    if len(chosen) == len(of_step) == 1:  # one bound to each task, which may be number 0 of those that it can open
        chosen = of_step if of_step[0].isdigit() else chosen
    return [gpus[int(n)] for n in chosen if n.isdigit() and int(n) < len(gpus)] or gpus


def _cores(text: str) -> set[int]:
    """The kernel's "0-3,8" as numbers."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
