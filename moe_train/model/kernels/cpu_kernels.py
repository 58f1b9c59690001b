"""Which GEMM kernels are the fastest on this processor: measured once, then read from a cache.

A rule does not hold: oneDNN is twice as fast as MKL on some AMD processors and 10 % faster on others, and which kernel
multiplies small groups best changes with the processor and the precision. The measurement takes about a second, once
for each processor, torch version, number of threads and precision. On a busy machine it gives up, and the defaults of
`cpu_gemm.py` are remembered. The first decision stays, so that a resumed run rounds as before; running this module with
`python -m` measures again. Every rank uses what rank 0 uses, so that all ranks round alike.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from moe_train.files import atomic, untrusted
from moe_train.model.kernels import cpu_gemm

log = logging.getLogger(__name__)

Choice = dict[str, str]
"""Name of the kernel by operation (`cpu_gemm.KERNELS`)."""

_WARM_UP, _ROUNDS = 2, 8  # the first calls create threads and code
_LONGEST_S = 4.0  # an idle machine takes a second
_NOISE = 1.5  # median over minimum, above which other processes disturb the measurement
_FASTER_BY = 1.05  # what another kernel must gain to replace the default: closer ones would change from run to run
_ROWS, _WIDTH, _GROUPS = 2048, 320, 8
_SMALL_ROWS_OF_A_GROUP, _SMALL_GROUPS = 24, 32


def choose(dtype: torch.dtype) -> None:
    """Let every rank run the fastest kernels for `dtype`. A collective call, on ranks whose device is the CPU."""
    choice: list[Choice | None] = [None]
    if dist.get_rank() == 0:
        choice[0] = remembered(dtype) or measure_and_remember(dtype)
    dist.broadcast_object_list(choice, src=0)
    cpu_gemm.use(dtype, choice[0] or {})


def cache_file() -> Path | None:
    """Where choices are kept: the user's cache directory (XDG base directory specification); None without a home."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(home) / "moe-train" / "cpu_kernels.json"


def key_of(dtype: torch.dtype) -> str:
    """What a choice holds for."""
    name = str(dtype).removeprefix("torch.")
    return f"{processor()}; torch {torch.__version__}; {torch.get_num_threads()} threads; {name}"


def processor() -> str:
    """Model of this machine's processor. Cloud providers hide its name, so the numbers of the model are part of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    return ", ".join(f"{name} {values[name]}" for name in ("model name", "cpu family", "model") if name in values)


def remembered(dtype: torch.dtype) -> Choice | None:
    """The choice in the cache, if there is one for this machine and it names kernels that exist."""
    choice = _read_cache().get(key_of(dtype))
    if not isinstance(choice, dict) or set(choice) != set(cpu_gemm.KERNELS):
        return None
    known = all(name in cpu_gemm.candidates(operation, dtype) for operation, name in choice.items())
    return choice if known else None


def _read_cache() -> dict[str, Choice]:
    """Everything in the cache; nothing where it is missing or damaged, since it can be measured again."""
    path = cache_file()
    try:
        return untrusted.read_object(path) if path is not None else {}
    except (OSError, ValueError):
        return {}


def measure_and_remember(dtype: torch.dtype) -> Choice:
    """The fastest kernels, written to the cache; the defaults where this machine is busy or nothing can be written."""
    path = cache_file()
    if path is None or not _writable(path.parent):
        log.info("no cache directory can be written: GEMM kernels are the defaults")
        return defaults(dtype)
    choice = measure(dtype)
    log.info("GEMM kernels in %s: %s", dtype, choice or "the defaults, since the machine is busy")
    choice = choice or defaults(dtype)
    try:
        content = _read_cache() | {key_of(dtype): choice}
        atomic.write_text(path, json.dumps(content, indent=1))
    except OSError as error:
        # A run that measures again after a restart could round otherwise, so what is not remembered is not used.
        log.info("%s cannot be written (%s): GEMM kernels are the defaults", path, error.strerror or error)
        return defaults(dtype)
    return choice


def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


def defaults(dtype: torch.dtype) -> Choice:
    """The kernels that run where nothing was measured."""
    return {operation: cpu_gemm.candidates(operation, dtype)[0] for operation in cpu_gemm.KERNELS}


@torch.no_grad()
def measure(dtype: torch.dtype) -> Choice | None:
    """The fastest kernel of each operation, by name; None where other processes disturb the measurement."""
    deadline = time.perf_counter() + _LONGEST_S
    choice = {}
    for operation in cpu_gemm.KERNELS:
        fastest = _fastest(operation, dtype, deadline)
        if fastest is None:
            return None
        choice[operation] = fastest
    return choice


def _fastest(operation: str, dtype: torch.dtype, deadline: float) -> str | None:
    names = cpu_gemm.candidates(operation, dtype)
    if len(names) == 1:
        return names[0]
    seconds = {name: list[float]() for name in names}
    for call in _calls(operation, dtype):
        for name in names:  # in turns, so that what disturbs the machine disturbs all of them
            began = time.perf_counter()
            call(cpu_gemm.KERNELS[operation][name])
            seconds[name].append(time.perf_counter() - began)
        if time.perf_counter() > deadline:
            return None
    steady = {name: sorted(taken[_WARM_UP:]) for name, taken in seconds.items()}
    if any(statistics.median(taken) > _NOISE * taken[0] for taken in steady.values()):
        return None
    fastest, default = min(names, key=lambda name: steady[name][0]), names[0]
    return fastest if steady[default][0] > _FASTER_BY * steady[fastest][0] else default


def _calls(operation: str, dtype: torch.dtype) -> Iterator[Callable[[cpu_gemm.Kernel], object]]:
    """Calls of a kernel of `operation`, with new numbers of rows in every round, as routing gives them."""
    grouped, small, outer = "grouped" in operation, "small" in operation, "outer" in operation
    groups = _SMALL_GROUPS if small else _GROUPS
    rows = groups * _SMALL_ROWS_OF_A_GROUP if small else _ROWS
    left = torch.randn(rows, _WIDTH, dtype=torch.float32).to(dtype)
    right_shape = (rows, _WIDTH) if outer else ((groups, _WIDTH, _WIDTH) if grouped else (_WIDTH, _WIDTH))
    right = torch.randn(right_shape, dtype=torch.float32).to(dtype)
    rng = random.Random(0)
    for _ in range(_ROUNDS):
        counts = uneven_counts(rows, groups, rng)
        # Weights are stored [out, in]: the forward pass multiplies by a transposed view.
        weights = right if outer else right.mT
        yield lambda kernel, counts=counts, weights=weights: (  # type: ignore[misc]
            kernel(left, weights, counts) if grouped else kernel(left, weights)
        )


def uneven_counts(rows: int, groups: int, rng: random.Random) -> list[int]:
    """Numbers of rows of each group, which add up to `rows`, with a standard deviation of a quarter of the mean."""
    shares = [max(0.1, rng.gauss(1, 0.25)) for _ in range(groups)]
    counts = [int(rows * share / sum(shares)) for share in shares]
    counts[0] += rows - sum(counts)
    return counts


def main() -> None:
    """Measure again, and print the choices."""
    for dtype in (torch.float32, torch.bfloat16):
        print(key_of(dtype))
        for operation, name in measure_and_remember(dtype).items():
            print(f"  {operation}: {name}")


if __name__ == "__main__":
    main()
