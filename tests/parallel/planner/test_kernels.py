"""Kernels and messages: what the model of time must do whatever its constants are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe_train.config.cluster import ClusterConfig
from moe_train.config.composition.explain import CONF_DIR
from parallel.planner import kernels, network
from parallel.planner.calibration import FITTED
from parallel.planner.hardware import Hardware
from parallel.planner.network import Group, Routing
from tools.published.clusters import hardware_of

H800, H100, GB200 = hardware_of("h800"), hardware_of("h100"), hardware_of("gb200")


def rate(rows: float, columns: float, inner: float, precision: str = "bf16", copies: int = 1) -> float:
    """FLOP/s of a product."""
    return 2 * rows * columns * inner * copies / kernels.gemm(H800, FITTED, precision, rows, columns, inner, copies)


def test_a_large_gemm_reaches_what_the_cluster_says() -> None:
    best = H800.matmul_flops("bf16") * FITTED.gemm_speed
    assert 0.9 * best < rate(16384, 16384, 16384) <= best


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((128, 4096, 4096), (4096, 4096, 4096)),
        ((4096, 4096, 64), (4096, 4096, 4096)),
        ((4096, 4097, 4096), (4096, 4096, 4096)),
    ],
)
def test_shape_decides_how_fast_a_gemm_is(small: tuple[int, int, int], large: tuple[int, int, int]) -> None:
    """Few rows, a short inner size and an edge that sticks out of a tile are slower."""
    assert rate(*small) < rate(*large)


def test_many_small_experts_are_one_grouped_product() -> None:
    assert rate(512, 4096, 7168, copies=32) > 2 * rate(512, 512, 7168)


@pytest.mark.parametrize("shape", [(0, 4096, 4096), (4096, 0, 4096), (4096, 4096, 0)])
def test_a_gemm_without_elements_takes_no_time(shape: tuple[int, int, int]) -> None:
    """Such as that of a rank whose experts get no token."""
    assert kernels.gemm(H800, FITTED, "bf16", *shape) == 0.0


def test_a_thin_product_is_bound_by_memory() -> None:
    moved = 2 * (16384 * 16384 + 16384 + 16384)
    assert kernels.gemm(H800, FITTED, "bf16", 1, 16384, 16384) >= moved / H800.memory_bytes_per_s


def test_fp8_is_faster_where_there_is_fp8() -> None:
    assert rate(8192, 8192, 8192, "fp8") > 1.5 * rate(8192, 8192, 8192)
    a100 = hardware_of("a100")
    assert a100.matmul_flops("fp8") == a100.matmul_flops("bf16")


def test_attention_is_faster_for_long_sequences() -> None:
    short, long = (kernels.attention(H800, FITTED, 1e12, keys) for keys in (512, 65536))
    assert short > 1.3 * long


@pytest.mark.parametrize(
    ("name", "forward", "backward"), [("h200", 633, 539), ("gb200", 1609, 1287), ("a100", 203, 175)]
)
def test_attention_is_as_fast_as_measured_where_it_was(name: str, forward: float, backward: float) -> None:
    """TFLOPS at 16,384 tokens."""
    measured = replace(FITTED, attention_speed=1.0)
    ahead = kernels.attention(hardware_of(name), measured, 1e15, 16384)
    back = kernels.attention(hardware_of(name), measured, 1e15, 16384, backward=True)
    assert (1e3 / ahead, 1e3 / back) == pytest.approx((forward, backward), rel=0.01)


def test_a_ring_leaves_a_node_through_all_its_network_cards() -> None:
    """8 members a node share the way out; one member a node has one card."""
    size = 1e9
    inside, spread, alone = (network.ring(H800, group, size) for group in (Group(8), Group(64), Group(8, 8)))
    assert inside == pytest.approx(size * 7 / 8 / H800.domain_bytes_per_s, rel=0.01)
    assert spread == pytest.approx(
        size * 63 / 64 / min(H800.domain_bytes_per_s, 8 * H800.network_bytes_per_s), rel=0.01
    )
    assert alone == pytest.approx(size * 7 / 8 / H800.network_bytes_per_s, rel=0.01)
    assert network.ring(H800, Group(1), size) == 0


def test_tokens_visit_a_limited_number_of_nodes() -> None:
    """DeepSeek-V3: at most 4 of 8 nodes; without the limit more (arXiv 2412.19437, section 3.2.2)."""
    limited, free = network.places_visited(8, Routing(8, 8, 4)), network.places_visited(8, Routing(8))
    assert 3 < limited <= 4
    assert 4 < free < 8


def test_dispatch_by_node_sends_less_over_the_network() -> None:
    args = (H800, Group(64), 4096, 14336, Routing(8, 8, 4))
    assert network.all_to_all(*args, deduplicated=True) < 0.6 * network.all_to_all(*args, deduplicated=False)
    assert network.network_bytes(*args, True) < 0.6 * network.network_bytes(*args, False)
    assert network.all_to_all(GB200, Group(64), 4096, 14336, Routing(8), True) < 1e-3  # one NVLink domain
    assert network.network_bytes(GB200, Group(64), 4096, 14336, Routing(8), True) == 0


def test_an_exchange_around_a_ring_waits_for_its_slowest_link() -> None:
    assert network.relay(H800, Group(16), 1e9) > 3 * network.relay(H800, Group(8), 1e9)


def test_a_core_of_a_cpu_has_no_large_tiles_to_fill() -> None:
    """A tenth of the rows takes a tenth of the time."""
    core = hardware_of("local_cpu")
    few, many = (kernels.gemm(core, FITTED, "fp32", rows, 512, 512) for rows in (64, 640))
    assert many == pytest.approx(10 * few)
    peak = core.matmul_flops("fp32") * FITTED.gemm_speed
    assert 0.9 * peak < 2 * 512**3 / kernels.gemm(core, FITTED, "fp32", 512, 512, 512) <= peak


def test_attention_on_a_core_of_a_cpu_has_no_units_to_fill() -> None:
    """Its speed does not depend on the length of the sequence."""
    core = hardware_of("local_cpu")
    short, long = (kernels.attention(core, FITTED, 1e9, keys) for keys in (16, 16384))
    assert short == pytest.approx(long, rel=1e-9)


@pytest.mark.parametrize(("precision", "operand", "output"), [("fp8", 1, 2), ("bf16", 2, 2), ("fp32", 4, 4)])
def test_bytes_that_a_gemm_moves(precision: str, operand: int, output: int) -> None:
    """Two operands in their precision, and an output in 16 bits at least. With one row they bound the time."""
    rows, columns, inner = 1, 8192, 4096
    slow = replace(H800, memory_tb_per_s=1e-3)
    moved = operand * (rows * inner + inner * columns) + output * rows * columns
    expected = 3 * moved / slow.memory_bytes_per_s
    assert kernels.gemm(slow, FITTED, precision, rows, columns, inner, 3) == pytest.approx(expected, rel=1e-12)


def test_messages_one_after_another_wait_each_for_the_first_byte() -> None:
    for group in (Group(8), Group(64)):
        one, three = (network.ring(H800, group, 1e6, messages) for messages in (1, 3))
        latency = H800.domain_latency_us if group.size == 8 else H800.network_latency_us
        assert three - one == pytest.approx(2 * latency * 1e-6)


def test_a_lower_power_limit_makes_products_slower() -> None:
    """What was measured under another limit than a GPU has is scaled; attention is not."""
    usual, capped = (replace(H100, power_limit_watts=watts) for watts in (700.0, 350.0))
    fast, slow = (kernels.gemm(one, FITTED, "bf16", 8192, 8192, 8192) for one in (usual, capped))
    assert slow == pytest.approx(fast * 2**FITTED.power_exponent)
    assert kernels.attention(usual, FITTED, 1e12, 4096) == kernels.attention(capped, FITTED, 1e12, 4096)


@pytest.mark.parametrize("path", sorted((CONF_DIR / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_number_of_a_cluster_has_a_source(path: Path) -> None:
    fields = [line for line in path.read_text().splitlines() if re.match(r"\w+: [\d.]+", line)]
    assert len(fields) > 25
    for line in fields:
        _, _, source = line.partition("#")
        assert len(source.strip()) > 3, line
        assert not re.search(r"typical|assum|estimate|guess", source), line


@pytest.mark.parametrize("path", sorted((CONF_DIR / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_fractions_are_what_was_measured_over_the_peak(path: Path) -> None:
    """Where a comment begins with what was measured."""
    peaks = hardware_of(path.stem)
    units = {
        "bf16_fraction": (peaks.bf16_tflops, r"([\d,.]+) TFLOPS"),
        "fp8_fraction": (peaks.fp8_tflops, r"([\d,.]+) TFLOPS"),
        "attention_fraction": (peaks.bf16_tflops, r"([\d,.]+) TFLOPS"),
        "attention_backward_fraction": (peaks.bf16_tflops, r"([\d,.]+) TFLOPS"),
        "flash2_fraction": (peaks.bf16_tflops, r"([\d,.]+) TFLOPS"),
        "memory_fraction": (peaks.memory_tb_per_s, r"([\d.]+) TB/s"),
        "domain_fraction": (peaks.domain_gb_per_s, r"([\d.]+) GB/s"),
    }
    found = 0
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        value, _, source = rest.partition("#")
        if name in units and (measured := re.match(units[name][1], source.strip())):
            found += 1
            assert float(value) == pytest.approx(float(measured[1].replace(",", "")) / units[name][0], rel=0.012), line
    assert found >= 1 or path.stem in ("gb300", "local_cpu")


def test_a_cluster_without_a_file_is_an_h800() -> None:
    """The defaults of the fields are those of conf/cluster/h800.yaml."""
    assert Hardware.of(ClusterConfig()) == H800
