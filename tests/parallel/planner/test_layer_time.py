"""Work of a layer against what its weights and tensors say, on an accelerator that is the same at every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import workload_of
from parallel.planner import software
from parallel.planner.calibration import FITTED
from parallel.planner.layer_time import Machine, Times, embedding_times, layer_times, loss_times
from parallel.planner.workload import Workload
from tests.parallel.planner import small
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


def test_parts_of_the_same_name_are_added_up() -> None:
    times = Times(kernels_forward=5, kernels_backward=6, graphed_forward=1, graphed_backward=2)
    times.add("memory", 1.0, 2.0, 3.0, recompute=True)
    times.add("memory", 10.0, 20.0, 30.0, recompute=True)
    times.add("memory", 100.0)
    assert (times.forward, times.inputs, times.weights) == ({"memory": 111.0}, {"memory": 22.0}, {"memory": 33.0})
    assert times.recompute == {"memory": 11.0}
    other = Times({"gemm": 7.0}, {"memory": 1.0}, {}, {"memory": 2.0}, 7.0, 8.0, 3.0, 4.0)
    times.plus(other, 3)
    assert (times.forward, times.inputs) == ({"memory": 111.0, "gemm": 21.0}, {"memory": 25.0})
    assert (times.weights, times.recompute) == ({"memory": 33.0}, {"memory": 17.0})
    assert (times.kernels_forward, times.kernels_backward) == (5 + 3 * 7, 6 + 3 * 8)
    assert (times.graphed_forward, times.graphed_backward) == (1 + 3 * 3, 2 + 3 * 4)


def test_bytes_and_kernels_of_a_layer_with_grouped_queries() -> None:
    """tp=2 without sequence parallelism: 16 tokens, hidden 10, 2 query heads of 6 and 1 key/value head, inner 6.

    A GEMM [a, c] x [c, b] of BF16 moves 2 x (ac + cb + ab) bytes in each pass: 1,568 for queries, keys and values
    (16, 24, 10), 944 for the output (16, 10, 12), 944 and 632 for the feed-forward (16, 12, 10 and 16, 10, 6), 4,088 in
    all. Gradients of the weights are read and written in 4 bytes: 8 x (240 + 120 + 120 + 60) = 4,320.

    Memory: rotary embedding 2 x 576; two norms and two sums of 320 bytes, 3,200; gate and up 3 x 192 and 5 x 192.
    Attention: 16 x 2 x 16 x 12 = 6,144 FLOPs; five products for two are 15,360, at half of the speed.
    Two all-reduces of 320 bytes, of which a rank sends half twice.
    """
    times = layer_times(small.workload(small.GQA, {"tp": 2}), small.machine(), moe=False)
    assert times.forward == pytest.approx({"gemm": 4088, "memory": 1152 + 3200 + 576, "attention": 6144, "tp": 640})
    assert times.inputs == pytest.approx({"gemm": 4088, "memory": 1152 + 3200 + 960, "attention": 30720, "tp": 640})
    assert times.weights == pytest.approx({"gemm": 4088 + 4320})
    assert times.recompute == {}
    # Four GEMMs, rotary embedding, attention 2 and 3, norms and sums 4, the activation.
    assert (times.kernels_forward, times.kernels_backward) == (4 + 1 + 2 + 4 + 1, 8 + 1 + 3 + 4 + 1)
    chosen = small.workload(small.GQA, {"tp": 2}, recompute="selective", recompute_modules=frozenset({"layernorm"}))
    again = layer_times(chosen, small.machine(), moe=False)
    assert again.recompute == pytest.approx({"memory": 4 * 320})
    assert (again.kernels_forward, again.kernels_backward) == (12, 17 + 2)


def test_bytes_and_kernels_of_a_layer_with_latents() -> None:
    """tp=2 with sequence parallelism: 8 of 16 tokens where it divides them, 2 heads of 6 + 2 and of 5, latents 3 and 4.

    GEMMs, as above: latents of queries (8, 3, 10) 268; queries (16, 16, 3) 704; latents of keys and values (8, 6, 10)
    376; keys and values (16, 22, 4) 1,008; output (16, 10, 10) 840; feed-forward 944 + 632. 4,772 in all. Gradients of
    weights: 8 x (30 + 48 + 60 + 88 + 100 + 120 + 60) = 4,048.

    Memory: norms of latents of 112 bytes 2 and 3 times; queries and keys of 1,024 twice; norms and sums 1,600;
    activation 576 and 960. Attention: 16 x 2 x 16 x 13 = 6,656; 3 x 8 + 2 x 5 for 13 make 17,408.

    tp: attention gathers 288 bytes (3 + 4 + 2 a token) and scatters 320; the feed-forward gathers and scatters 320. A
    rank moves half of each; inputs are gathered twice in the backward pass.
    """
    times = layer_times(small.workload(small.MLA, {"tp": 2}, sequence_parallel=True), small.machine(), moe=False)
    memory = {"forward": 224 + 2048 + 1600 + 576, "backward": 336 + 2048 + 1600 + 960}
    sent = {"forward": (144 + 160) + (160 + 160), "backward": (160 + 288) + (160 + 320)}
    assert times.forward == pytest.approx(
        {"gemm": 4772, "memory": memory["forward"], "attention": 6656, "tp": sent["forward"]}
    )
    assert times.inputs == pytest.approx(
        {"gemm": 4772, "memory": memory["backward"], "attention": 2 * 17408, "tp": sent["backward"]}
    )
    assert times.weights == pytest.approx({"gemm": 4772 + 4048})
    assert (times.kernels_forward, times.kernels_backward) == (7 + 2 + 3 + 2 + 4 + 1, 14 + 2 + 3 + 3 + 4 + 1)


def test_bytes_and_kernels_of_routed_experts() -> None:
    """ep=2: 4 heads and 2 key/value heads of 6, 2 of 4 experts of inner 6, which get 16 tokens each.

    GEMMs: attention (16, 48, 10) 2,816 and (16, 10, 24) 1,568; router (16, 4, 10) 528; experts 2 x 944 and 2 x 632.
    Gradients of weights: 8 x (480 + 240 + 40 + 2 x 120 + 2 x 60) = 8,960.

    Memory: rotary embedding 2,304; norms and sums 3,200; permutation of 10 x (16 + 32) x 2 = 960 bytes, twice; the
    activation of 384 bytes 3 and 5 times. The router moves its 256 bytes of scores 8 and 6 times.
    Each rank sends 16 tokens of 20 bytes to 2 experts, half of which are its own, there and back.
    """
    one = small.workload(small.GQA, {"ep": 2, "dp": 2})
    times = layer_times(one, small.machine(), moe=True)
    gemm = 2816 + 1568 + 528 + 2 * 944 + 2 * 632
    assert times.forward == pytest.approx(
        {"gemm": gemm, "memory": 2304 + 3200 + 1920 + 1152, "router": 2048, "attention": 12288, "all_to_all": 640}
    )
    assert times.inputs == pytest.approx(
        {"gemm": gemm, "memory": 2304 + 3200 + 1920 + 1920, "router": 1536, "attention": 61440, "all_to_all": 640}
    )
    assert times.weights == pytest.approx({"gemm": gemm + 8960})
    # GEMMs: attention 2, router 1, each of the 2 experts 2. Router 8 + 2, permutation 12 + 2.
    assert times.kernels_forward == 7 + 1 + 2 + 4 + 10 + 14 + 1
    assert times.kernels_backward == 14 + 1 + 3 + 4 + 10 + 14 + 1
    # Graphs hold what comes before dispatch.
    assert (times.graphed_forward, times.graphed_backward) == (3 + 1 + 2 + 4 + 10, 6 + 1 + 3 + 4 + 10)


def test_casts_of_several_experts_pass_memory_more_often() -> None:
    """One scale a tensor: a cast moves 5 bytes an element. Inputs of attention 16 x (10 + 24), of 2 experts of 16
    tokens 2 x 16 x (10 + 6), which pass 3 times. The router stays in BF16."""
    one = small.workload(small.GQA, {"ep": 2, "dp": 2}, fp8="tensor")
    times = layer_times(one, small.machine(expert_passes_2026=3.0), moe=True)
    assert times.forward["quantize"] == pytest.approx(5 * (16 * 34 + 3 * 2 * 16 * 16))


def test_blocks_of_a_ring_move_what_one_can_count() -> None:
    """cp=2: 8 tokens of a rank, 4 heads of 6 and 1 key/value head.

    192 elements of queries, 192 of outputs, 96 of keys and values. One further block: keys and values side by side
    twice 96, outputs twice 192, and 3 x 3/4 of 192 for the sum: 1,008 elements; backward 2 x 96 + 2 x (192 + 96) and
    9/4 of 288: 1,416. The ring passes 2 x 16 x 12 = 384 bytes, half of it from each rank, twice in the backward pass.
    """
    times = layer_times(small.workload(replace(small.GQA, num_query_groups=1), {"cp": 2}), small.machine(), moe=False)
    # Rotary embedding of 480 bytes twice, norms and sums 1,600, the activation of 192 bytes 3 and 5 times.
    assert times.forward["memory"] == pytest.approx(960 + 1600 + 576 + 2 * 1008)
    assert times.inputs["memory"] == pytest.approx(960 + 1600 + 960 + 2 * 1416)
    assert (times.forward["cp"], times.inputs["cp"]) == (pytest.approx(192), pytest.approx(384))
    # Attention has 2 and 3 kernels in each of two blocks, and the further one four more.
    assert (times.kernels_forward, times.kernels_backward) == (4 + 1 + 4 + 4 + 4 + 1, 8 + 1 + 6 + 4 + 4 + 1)


def test_the_block_that_the_mask_halves_is_as_slow_as_a_short_sequence() -> None:
    """6,144 FLOPs in two blocks: one whole one of 16 keys, and one as if it had 8. With so few keys attention reaches
    keys / (keys + 500) of its speed at 16,384 tokens, which is 1 / (1 + 500 / 16,384) of its peak."""
    hardware = replace(small.HARDWARE, multiprocessors=2)
    machine = Machine(hardware, small.SOFTWARE, small.CONSTANTS)
    times = layer_times(small.workload(small.GQA, {"cp": 2}), machine, moe=False)
    whole, halved = 3072 * (16 + 500) / 16, 3072 * (8 + 500) / 8
    assert times.forward["attention"] == pytest.approx((whole + halved) / (1 + 500 / 16384))


def test_bytes_and_kernels_of_head_and_loss() -> None:
    """tp=2: half of 256 rows. GEMM (16, 128, 10) 6,976, gradients 8 x 1,280; 2,048 scores in 12 and 8 bytes. Only the
    gradient of the input is summed over ranks: 320 bytes, half of it sent twice."""
    times = loss_times(small.workload(small.GQA, {"tp": 2}), small.machine())
    assert times.forward == pytest.approx({"gemm": 6976, "memory": 12 * 2048})
    assert times.inputs == pytest.approx({"gemm": 6976, "memory": 8 * 2048, "tp": 320})
    assert times.weights == pytest.approx({"gemm": 6976 + 10240})
    assert (times.kernels_forward, times.kernels_backward) == (1 + 4, 2 + 4)
