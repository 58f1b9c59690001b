"""Where benchmarks write what they measured: bench/results/NAME.json, summary, then rows, then the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_train.files import atomic

DIRECTORY = Path(__file__).parent / "results"


def write(name: str, summary: dict[str, Any], rows: Sequence[dict[str, Any]], directory: Path = DIRECTORY) -> Path:
    """Write one result and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    atomic.write_text(path, json.dumps({**summary, "rows": list(rows), "machine": machine()}, indent=1) + "\n")
    return path


def read(name: str, directory: Path = DIRECTORY) -> dict[str, Any]:
    """A result that was measured on a machine like this one.

    Raises:
        SystemExit: there is none.
    """
    path = directory / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("machine") != machine():
        raise SystemExit(f"error: {path} was not measured on a machine like this one; measure all rows")
    return result


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "megatron-core")},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
