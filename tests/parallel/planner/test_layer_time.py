"""Work of a layer against what its weights and tensors say, on an accelerator that is the same at every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import workload_of
from parallel.planner import software
from parallel.planner.calibration import FITTED
from parallel.planner.layer_time import Machine, embedding_times, layer_times
from parallel.planner.workload import Workload
from tools.published.clusters import hardware_of

# One unit has no tiles and no waves to fill. Memory is so fast that every GEMM is bound by its work.
EVEN = replace(hardware_of("local_cpu"), memory_tb_per_s=1e12)
CONSTANTS = replace(FITTED, gemm_half_k=0.0, gemm_speed=1.0, weights_speed=1.0, memory_passes=1.0)
SOFTWARE = replace(software.of_date(202604), imbalance=1.0)


def workload(model: str, **changes: object) -> Workload:
    cfg = compose([f"model={model}", "runtime=cuda", "precision=bf16", "train.seq_length=4096"])
    return replace(workload_of(cfg, validate(cfg, trains=False)), **changes)


# Weights that each token passes in a layer, from the published configs (config.json of each model).
GQA = 3584 * (28 + 2 * 4) * 128 + 28 * 128 * 3584  # Qwen2-57B-A14B: queries, keys, values; output
MLA = 5120 * 1536 + 1536 * 128 * 192 + 5120 * (512 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 5120  # DeepSeek-V2
PASSED = {
    ("qwen2_moe_57b_a14b", True): GQA + 3584 * 64 + 8 * 3 * 3584 * 2560 + 3 * 3584 * 20480,
    ("deepseek_v2", False): MLA + 3 * 5120 * 12288,
    ("deepseek_v2", True): MLA + 5120 * 160 + 6 * 3 * 5120 * 1536 + 2 * 3 * 5120 * 1536,
}


@pytest.mark.parametrize(("model", "moe"), PASSED)
def test_a_token_costs_two_operations_for_each_weight_it_passes(model: str, moe: bool) -> None:
    """Forward, for the gradient of the inputs, and for that of the weights. Attention itself is counted apart."""
    times = layer_times(workload(model), Machine(EVEN, SOFTWARE, CONSTANTS), moe)
    seconds = 2 * 4096 * PASSED[model, moe] / EVEN.matmul_flops("bf16")
    assert times.forward["gemm"] == pytest.approx(seconds)
    assert times.inputs["gemm"] == pytest.approx(seconds)
    assert times.weights["gemm"] == pytest.approx(seconds, rel=1e-3)  # and gradients of earlier micro-batches


@pytest.mark.parametrize(("pad_to", "share"), [(0.5, 0.5), (2.0, 2.0)])
def test_imbalance_is_more_work_for_routed_experts_alone(pad_to: float, share: float) -> None:
    one = workload("qwen2_moe_57b_a14b")
    even, other = (
        layer_times(one, Machine(EVEN, replace(SOFTWARE, imbalance=imbalance), CONSTANTS), True).forward["gemm"]
        for imbalance in (1.0, pad_to)
    )
    routed = 2 * 4096 * 8 * 3 * 3584 * 2560 / EVEN.matmul_flops("bf16")
    assert other - even == pytest.approx((share - 1) * routed)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_embedding_is_read_and_written_and_never_recomputed(recompute: str) -> None:
    """Rows of the table are read and the hidden state is written; its gradient is read and added to the table's."""
    hardware = replace(EVEN, memory_tb_per_s=1.0, memory_fraction=1.0)
    times = embedding_times(workload("qwen2_moe_57b_a14b", recompute=recompute), Machine(hardware, SOFTWARE, CONSTANTS))
    size = 2 * 4096 * 3584
    assert times.forward == {"memory": pytest.approx(2 * size / 1e12)}
    assert times.inputs == {"memory": pytest.approx(3 * size / 1e12)}
    assert times.recompute == {}
