"""What a run costs: time, money, energy and carbon, with failures and checkpoints. Pure functions; no torch import."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from parallel.planner.hardware import GB, Hardware

HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Goodput:
    """What failures and checkpoints leave of the time that is paid for.

    Args:
        interval_s: time between checkpoints.
        save_s: a checkpoint stops the job for so long.
        failures_per_day: stops expected on a day.
        fraction: useful over paid time.
    """

    interval_s: float
    save_s: float
    failures_per_day: float
    fraction: float


def save_seconds(hardware: Hardware, checkpoint_bytes: float, gpus: int) -> float:
    """Time to write a checkpoint of `checkpoint_bytes` in all, each GPU its part."""
    return checkpoint_bytes / gpus / (hardware.storage_gb_per_s_per_gpu * GB)


def failures_per_day(hardware: Hardware, gpus: int) -> float:
    """Stops of a job on `gpus` GPUs expected on a day: each GPU, with its part of all else, fails independently."""
    return gpus / hardware.gpu_days_between_failures


def best_interval(save_s: float, failures: float) -> float:
    """Time between checkpoints that loses least, seconds (Daly's first-order optimum, FGCS 22(3), 2006)."""
    return max(save_s, sqrt(2 * save_s * DAY / failures)) if failures else DAY


def goodput(hardware: Hardware, checkpoint_bytes: float, gpus: int, interval_s: float | None = None) -> Goodput:
    """Expected goodput at an interval, or at the best one.

    A failure costs the restart and, on average, half of what was computed since the last checkpoint.
    """
    save, failures = save_seconds(hardware, checkpoint_bytes, gpus), failures_per_day(hardware, gpus)
    interval = interval_s or best_interval(save, failures)
    useful = interval / (interval + save)
    lost = failures / DAY * (hardware.restart_s + (interval + save) / 2)
    return Goodput(interval, save, failures, useful / (1 + lost))


@dataclass(frozen=True)
class CostEstimate:
    """What one stage of a recipe takes. `days` is None where only its GPU-hours are known."""

    name: str
    tokens: float
    gpu_hours: float
    days: float | None
    dollars: float
    kwh: float
    kg_co2: float


def estimate_cost(
    hardware: Hardware, name: str, gpu_hours: float, gpus: int | None, tokens: float = 0.0, busy: float = 1.0
) -> CostEstimate:  # fmt: skip
    """Money, energy and carbon of `gpu_hours`, of which a part is busy."""
    kwh = gpu_hours * busy * hardware.watts_per_gpu / 1000 * hardware.power_usage_effectiveness
    return CostEstimate(
        name, tokens, gpu_hours, gpu_hours / gpus / 24 if gpus else None, gpu_hours * hardware.dollars_per_gpu_hour,
        kwh, kwh * hardware.kg_co2_per_kwh,
    )  # fmt: skip


def gpu_hours(tokens: float, tokens_per_s_per_gpu: float) -> float:
    """GPU-hours of so many tokens."""
    return tokens / tokens_per_s_per_gpu / HOUR
