"""Time of one kernel on one accelerator, from its shape. Pure functions; no torch import."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from parallel.planner.calibration import Calibration
from parallel.planner.hardware import Hardware

# Tokens at which causal attention reaches half of its speed (200 to 1,300 as A100, H200, GB200, GB300 are measured at
# 2,048 to 16,384 tokens: NVIDIA/cudnn-frontend, benchmark/attention_training), and at which its fractions hold.
ATTENTION_HALF, ATTENTION_MEASURED = 500, 16384
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))  # rows and columns of an output tile
TILE_SPEED = {128 * 256: 1.0, 128 * 128: 0.92, 128 * 64: 0.75, 64 * 64: 0.5}  # of its main loop, by area


def gemm(
    hardware: Hardware,
    constants: Calibration,
    precision: str,
    rows: float,
    columns: float,
    inner: float,
    copies: int = 1,
) -> float:
    """Seconds of `copies` products [rows, inner] x [inner, columns] that run as one grouped kernel.

    Three things slow a small product down: tiles that stick out over its edges, a last wave of tiles that does not fill
    the multiprocessors, and the start and end of each tile's loop over the inner size. A product that moves more bytes
    than it has work for is bound by memory.
    """
    if min(rows, columns, inner) <= 0:
        return 0.0
    peak = hardware.matmul_flops(precision) * constants.gemm_speed
    peak *= (hardware.power_limit_watts / hardware.measured_at_watts) ** constants.power_exponent
    units = hardware.multiprocessors
    # A single unit is a core of a CPU, whose tiles are small.
    best = 1.0 if units == 1 else _best_tile(units, rows, columns, copies)
    ramp = inner / (inner + constants.gemm_half_k)
    compute = 2 * rows * columns * inner * copies / (peak * best * ramp)
    element = {"fp8": 1, "bf16": 2, "fp32": 4}[precision]
    output = max(2, element)  # FP8 products are accumulated and written in 16 bits or more
    moved = copies * (element * (rows * inner + inner * columns) + output * rows * columns)
    return max(compute, moved / hardware.memory_bytes_per_s)


@lru_cache(maxsize=2**16, typed=True)  # products of whole numbers and of floats may differ in the last digit
def _best_tile(units: int, rows: float, columns: float, copies: int) -> float:
    """The efficiency of the best tile. A search asks for the same products again and again."""
    return max(_tile_efficiency(units, rows, columns, copies, *tile) for tile in TILES)


def _tile_efficiency(units: int, rows: float, columns: float, copies: int, height: int, width: int) -> float:
    """Useful work over what full waves of full tiles could do. Kernels split the last wave's inner loop: half of it
    counts."""
    tiles = copies * ceil(rows / height) * ceil(columns / width)
    covered = copies * rows * columns / (tiles * height * width)
    waves = tiles / units
    filled = waves / ((ceil(waves) + waves) / 2)
    return covered * filled * TILE_SPEED[height * width]


def memory(hardware: Hardware, moved: float) -> float:
    """Seconds to move `moved` bytes through memory."""
    return moved / hardware.memory_bytes_per_s


def attention(
    hardware: Hardware, constants: Calibration, flops: float, keys: float, *, flash2: bool = False,
    backward: bool = False,
) -> float:  # fmt: skip
    """Seconds of a pass of fused attention with `flops` of work, when a query sees up to `keys` keys; with `flash2` of
    FlashAttention-2, else of the fastest kernel."""
    reached = hardware.attention_backward_fraction if backward else hardware.attention_fraction
    if flash2:
        reached = hardware.flash2_fraction
    half = 0 if hardware.multiprocessors == 1 else ATTENTION_HALF  # a single unit is a core of a CPU
    filled = keys / (keys + half) * (1 + half / ATTENTION_MEASURED)
    return flops / (hardware.bf16_tflops * 1e12 * reached * constants.attention_speed * filled)
