"""One kind of accelerator and how many of them are joined, as the time model sees them. No torch import.

The fields are those of `moe_train.config.cluster.ClusterConfig`, which documents them; `conf/cluster/` has the numbers
with their sources.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from parallel.errors import ConfigError
from parallel.fp8_recipes import BLACKWELL, RECIPES

GIB = 2**30
GB = 1e9
TERA = 1e12
MICRO = 1e-6
BLACKWELL_TFLOPS = 4000  # of FP8; Hopper has less


@dataclass(frozen=True)
class Hardware:
    """An accelerator. Units are in the names: see `ClusterConfig`."""

    name: str
    gpu: str
    bf16_tflops: float
    fp8_tflops: float
    fp32_tflops: float
    multiprocessors: int
    memory_gib: float
    reserved_gib: float
    memory_tb_per_s: float
    domain_gpus: int
    domain_gb_per_s: float
    network_gb_per_s: float
    pod_gpus: int
    spine_fraction: float
    bf16_fraction: float
    fp8_fraction: float
    power_limit_watts: float
    measured_at_watts: float
    attention_fraction: float
    attention_backward_fraction: float
    flash2_fraction: float
    memory_fraction: float
    domain_fraction: float
    network_fraction: float
    domain_latency_us: float
    network_latency_us: float
    watts_per_gpu: float
    power_usage_effectiveness: float
    dollars_per_gpu_hour: float
    kg_co2_per_kwh: float
    gpu_days_between_failures: float
    restart_s: float
    storage_gb_per_s_per_gpu: float

    @classmethod
    def of(cls, config: Any) -> Hardware:
        """From an object with the same fields."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def blackwell(self) -> bool:
        """Whether its tensor cores scale blocks of 32 (MXFP8), and take operands in FP8 whichever way they lie."""
        return self.fp8_tflops > BLACKWELL_TFLOPS

    def refusal(self, recipe: str | None) -> ConfigError | None:
        """Why its tensor cores cannot compute in an FP8 or FP4 recipe (None: 16 or 32 bits), and what they can."""
        if recipe is None:
            return None
        if self.fp8_tflops <= self.bf16_tflops:
            return ConfigError(f"cluster={self.name} has no FP8 or FP4, which {recipe} needs", "use precision=bf16")
        if recipe in RECIPES and RECIPES[recipe].capability >= BLACKWELL and not self.blackwell:
            return ConfigError(
                f"cluster={self.name} has no {recipe.upper()}, which needs Blackwell", "use precision=fp8_block"
            )
        return None

    @property
    def usable_bytes(self) -> float:
        """Memory that torch can allocate, bytes."""
        return (self.memory_gib - self.reserved_gib) * GIB

    @property
    def offered_bytes(self) -> float:
        """Memory that a plan may fill, bytes: as many GB (10^9 bytes) as the accelerator has GiB.

        The rest is room for fragmentation, and for what the memory model misses.
        """
        return min(self.usable_bytes, self.memory_gib * GB)

    @property
    def memory_bytes_per_s(self) -> float:
        """Memory bandwidth that kernels reach, bytes/s."""
        return self.memory_tb_per_s * TERA * self.memory_fraction

    @property
    def domain_bytes_per_s(self) -> float:
        """NVLink bandwidth that collectives reach, one way, bytes/s."""
        return self.domain_gb_per_s * GB * self.domain_fraction

    @property
    def network_bytes_per_s(self) -> float:
        """Network bandwidth of one GPU that collectives reach, one way, bytes/s."""
        return self.network_gb_per_s * GB * self.network_fraction

    def matmul_flops(self, precision: str) -> float:
        """FLOP/s that a large matmul reaches in "fp8", "bf16" or "fp32"."""
        if precision == "fp8" and self.fp8_tflops > self.bf16_tflops:
            return self.fp8_tflops * TERA * self.fp8_fraction
        if precision == "fp32":
            return self.fp32_tflops * TERA * self.bf16_fraction
        return self.bf16_tflops * TERA * self.bf16_fraction
