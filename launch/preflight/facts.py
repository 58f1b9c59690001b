"""What a rank finds on its own node: versions, GPUs, memory, clock. Nothing here talks to other ranks."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("torch", "megatron-core", "transformer-engine", "numpy", "hydra-core")
_CODE = ("parallel", "moe_train", "launch")


@dataclass
class Facts:
    """One rank's findings. Every rank's are gathered on all.

    Args:
        node: host name.
        versions: of everything that must be equal everywhere, by name.
        clock_s: this node's clock less rank 0's, seconds.
        gpus: GPUs that the rank sees; None on CPU.
        gpu_problems: what its own GPU reports of itself.
        memory_free: share of the memory of the device that is free.
        sees_run_dir: whether it found the file that rank 0 wrote, and rank 0 its own.
        write_mb_s, read_mb_s: speed of the shared storage; None on all ranks of a node but the first.
        matmul_s: time of one multiplication while all others multiply too.
        link_gb_s: bandwidth to other nodes, best of those tried; None where it measured none.
        groups: {dimension: (first rank of the group, all-reduce GB/s, all-to-all GB/s)}.
    """

    node: str
    rank: int
    versions: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    gpus: int | None = None
    gpu_problems: list[str] = field(default_factory=list)
    memory_free: float = 1.0
    sees_run_dir: bool = True
    write_mb_s: float | None = None
    read_mb_s: float | None = None
    matmul_s: float = 0.0
    link_gb_s: float | None = None
    groups: dict[str, tuple[int, float, float]] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of libraries and of this project's code."""
    found = {"python": platform.python_version(), "code": code_digest()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@cache
def code_digest() -> str:
    """A digest of the project's Python files: equal where the code is."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def node_name() -> str:
    """As Slurm calls it."""
    return socket.gethostname().partition(".")[0]


def memory_free() -> float:
    """Free share of this node's main memory."""
    memory = psutil.virtual_memory()
    return float(memory.available / memory.total)


_FIELDS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "retired_pages.pending": "pages that wait to be retired",
    "remapped_rows.failure": "rows that could not be remapped",
    "clocks_throttle_reasons.hw_slowdown": "clocks slowed by hardware (power or heat)",
    "clocks_throttle_reasons.hw_thermal_slowdown": "clocks slowed by heat",
}
_FINE = {"0", "No", "Not Active", "[N/A]", "N/A", "[Not Supported]"}


def gpu_problems(index: int) -> list[str]:
    """What GPU `index` reports of its own health, through nvidia-smi; a list with one entry where that fails."""
    query = ",".join(_FIELDS)
    try:
        health = _nvidia_smi(f"--id={index}", f"--query-gpu={query}", "--format=csv,noheader")
        links = _nvidia_smi("nvlink", "--status", f"--id={index}")
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi fails: {error}"]
    return [*unhealthy(health), *dead_links(links)]


def gpu_driver() -> str:
    """Version of the driver, which must be equal everywhere."""
    try:
        return _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader", "--id=0").strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def unhealthy(line: str) -> list[str]:
    """The fields of nvidia-smi's line that are not as they should be."""
    values = [value.strip() for value in line.strip().split(",")]
    return [
        f"{text}: {value}" for text, value in zip(_FIELDS.values(), values, strict=False) if value not in _FINE
    ]  # an older driver gives fewer


def dead_links(text: str) -> list[str]:
    """NVLinks that nvidia-smi calls inactive, if others of the GPU are active."""
    links = [line.strip() for line in text.splitlines() if line.strip().startswith("Link ")]
    dead = [line.partition(":")[0] for line in links if "inactive" in line.lower()]
    return [f"NVLink down: {', '.join(dead)}"] if dead and len(dead) < len(links) else []


def _nvidia_smi(*words: str) -> str:
    return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=60, check=True).stdout
