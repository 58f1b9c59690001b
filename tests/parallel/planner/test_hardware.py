"""An accelerator: units, and what its tensor cores can compute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.planner.hardware import Hardware
from tools.published.clusters import hardware_of

H800, A100, GB200 = hardware_of("h800"), hardware_of("a100"), hardware_of("gb200")


def test_memory_that_a_plan_may_fill() -> None:
    """80 GiB are 85.90e9 bytes. A plan fills 80e9 of them, and less where the driver and NCCL reserve more."""
    little, much = (replace(H800, memory_gib=80.0, reserved_gib=gib) for gib in (2.0, 10.0))
    assert little.usable_bytes == 78 * 1024**3
    assert little.offered_bytes == 80e9
    assert much.offered_bytes == much.usable_bytes == 70 * 1024**3


def test_rates_are_fractions_of_the_peaks_in_bytes_and_flops() -> None:
    one = replace(
        H800, memory_tb_per_s=3.0, memory_fraction=0.9, domain_gb_per_s=200.0, domain_fraction=0.8,
        network_gb_per_s=50.0, network_fraction=0.7, bf16_tflops=1000.0, bf16_fraction=0.6, fp8_tflops=2000.0,
        fp8_fraction=0.5, fp32_tflops=60.0,
    )  # fmt: skip
    assert one.memory_bytes_per_s == pytest.approx(2.7e12)
    assert one.domain_bytes_per_s == pytest.approx(160e9)
    assert one.network_bytes_per_s == pytest.approx(35e9)
    assert [one.matmul_flops(p) for p in ("bf16", "fp8", "fp32")] == pytest.approx([600e12, 1000e12, 36e12])


def test_without_fp8_the_rate_of_fp8_is_that_of_bf16() -> None:
    """An accelerator without FP8 lists the same peak for both. The fraction of FP8 does not apply."""
    one = replace(A100, bf16_fraction=0.75, fp8_fraction=0.25)
    assert one.fp8_tflops == one.bf16_tflops
    assert one.matmul_flops("fp8") == one.matmul_flops("bf16") == pytest.approx(0.75 * 312e12)


@pytest.mark.parametrize(
    ("hardware", "recipe", "remedy"),
    [
        (A100, None, None), (A100, "fp8_block", "use precision=bf16"), (A100, "nvfp4", "use precision=bf16"),
        (H800, None, None), (H800, "fp8_block", None), (H800, "fp8_delayed", None),
        (H800, "mxfp8", "use precision=fp8_block"), (H800, "nvfp4", "use precision=fp8_block"),
        (GB200, "fp8_block", None), (GB200, "mxfp8", None), (GB200, "nvfp4", None),
    ],
)  # fmt: skip
def test_recipes_that_an_accelerator_can_compute(hardware: Hardware, recipe: str | None, remedy: str | None) -> None:
    """Ampere has no FP8, Hopper no formats with scales of 32 elements."""
    refused = hardware.refusal(recipe)
    assert (refused.remedy if refused else None) == remedy
    if refused:
        assert f"cluster={hardware.name} has no" in refused.cause
