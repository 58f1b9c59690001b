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

from launch.preflight.disks import Disk

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE_S = 60.0  # with nvidia-smi, which is slow where GPUs are busy
_LIBRARIES = (
    "torch", "megatron-core", "transformer-engine", "apex", "deep-ep", "flash-attn", "triton", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-modelopt", "nvidia-resiliency-ext", "mpi4py",
    "numpy", "tokenizers", "safetensors", "transformers", "hydra-core", "omegaconf",
)  # fmt: skip
"""What changes numbers, files or the traffic between ranks."""
_CODE = ("parallel", "moe_train", "launch")


@dataclass
class RankFacts:
    """Measurements of one rank, all-gathered over all ranks.

    Args:
        node: host name.
        versions: of everything that must be equal everywhere, by name.
        clock_s: this node's clock less rank 0's, seconds.
        gpus: GPUs that the rank sees; None on CPU.
        gpu: its own one, by its UUID; "" on CPU.
        gpu_problems: what its own GPU reports of itself.
        gpu_unchecked: what nvidia-smi would not say of it, with the reason.
        memory_free: share of the memory of the device that is free.
        unseen: fields of shared directories in which it did not find the file of rank 0, or rank 0 not its own.
        disks: directories that the run writes; none on all ranks of a node but the first.
        matmul_s: mean time of a multiplication while all others multiply too, without what the rank waited for a core.
        matmul_median_s, matmul_worst_s: the same, of single ones.
        waited: share of that time in which the rank waited for a core that other processes had.
        link_gb_s: bandwidth to other nodes, best of those tried; None where it measured none.
        groups: {dimension: (first rank of the group, all-reduce GB/s, all-to-all GB/s)}.
    """

    node: str
    rank: int
    versions: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    gpus: int | None = None
    gpu: str = ""
    gpu_problems: list[str] = field(default_factory=list)
    gpu_unchecked: dict[str, str] = field(default_factory=dict)
    memory_free: float = 1.0
    unseen: list[str] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    matmul_s: float = 0.0
    matmul_median_s: float = 0.0
    matmul_worst_s: float = 0.0
    waited: float = 0.0
    link_gb_s: float | None = None
    groups: dict[str, tuple[int, float, float]] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of libraries and of this project's code."""
    result = {"python": platform.python_version(), "code": code_digest()}
    for name in _LIBRARIES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "absent"
    return result


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
_LINKS = "NVLinks"
UNKNOWN = "unknown"
"""Version of a driver that nvidia-smi does not tell; `gpu_problems` has then found why."""


def gpu_problems(index: int | str) -> tuple[list[str], dict[str, str]]:
    """What the GPU with this number or UUID reports against its health through nvidia-smi, and what could not be
    asked, each with why."""
    problems, unchecked = [], {}
    try:
        values = _values(index)
    except (OSError, subprocess.SubprocessError) as error:  # no answer: each further question would wait as long
        return [], dict.fromkeys((*_FIELDS.values(), _LINKS), _reason(error))
    for field_, text in values.items():
        if isinstance(text, subprocess.CalledProcessError):
            unchecked[_FIELDS[field_]] = _reason(text)
        elif text not in _FINE:
            problems.append(f"{_FIELDS[field_]}: {text}")
    try:
        problems += dead_links(_nvidia_smi("nvlink", "--status", f"--id={index}"))
    except (OSError, subprocess.SubprocessError) as error:
        unchecked[_LINKS] = _reason(error)
    return problems, unchecked


def gpu_driver() -> str:
    """Version of the driver, which must be equal everywhere; `UNKNOWN` where nvidia-smi does not tell."""
    try:
        return _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader", "--id=0").strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def _values(index: int | str) -> dict[str, str | subprocess.CalledProcessError]:
    """nvidia-smi's answer for each field. One field that a driver does not know fails a query of several."""
    try:
        return dict(zip(_FIELDS, _query(index, *_FIELDS), strict=True))
    except (subprocess.CalledProcessError, ValueError):
        result: dict[str, str | subprocess.CalledProcessError] = {}
    for name in _FIELDS:
        try:
            result[name] = _query(index, name)[0]
        except subprocess.CalledProcessError as error:
            result[name] = error
    return result


def _query(index: int | str, *fields: str) -> list[str]:
    line = _nvidia_smi(f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return [value.strip() for value in line.strip().split(",")]


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    """What nvidia-smi said as it failed, on either of its outputs, or why there is no answer."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in f"{error.stdout}\n{error.stderr}".splitlines() if line.strip()]
    return lines[0] if lines else f"nvidia-smi ends with {error.returncode}"


def dead_links(text: str) -> list[str]:
    """NVLinks that nvidia-smi calls inactive, if others of the GPU are active."""
    links = [line.strip() for line in text.splitlines() if line.strip().startswith("Link ")]
    dead = [line.partition(":")[0] for line in links if "inactive" in line.lower()]
    return [f"NVLink down: {', '.join(dead)}"] if dead and len(dead) < len(links) else []


def _nvidia_smi(*words: str) -> str:
    command = ["nvidia-smi", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True).stdout
