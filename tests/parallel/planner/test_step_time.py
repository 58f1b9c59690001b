"""Time of a step: DeepSeek-V3 as published, and what must hold of any job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import weights_of, workload_of
from parallel.planner import kernels, software
from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.layer_time import Machine, Times, layer_times, loss_times, mtp_times, total
from parallel.planner.memory import Weights
from parallel.planner.simulation import step_time
from parallel.planner.software import Software
from parallel.planner.step_time import (
    StepTime,
    data_parallel_seconds,
    gather_weights,
    optimizer_seconds,
    parts_of_stage,
    plan_step,
    stage_parts,
    stage_time,
)
from parallel.planner.workload import Workload
from tests.parallel.planner import small
from tools.published.clusters import hardware_of

V3 = [
    "model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=cuda", "batch=large", "train.seq_length=4096",
    "precision=fp8_block", "recompute=deepseek_v3",
]  # fmt: skip
LONG = "model.max_position_embeddings=32768"
# arXiv 2505.09343, table 4, seconds.
STEP = 19.926
COMPONENTS = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}


def planned(
    *overrides: str, schedule: str = "1f1b", soft: Software | None = None, constants: Calibration = FITTED,
    **changes: object,
) -> StepTime:  # fmt: skip
    cfg = compose([*V3, *overrides])
    workload = replace(workload_of(cfg, validate(cfg)), **changes)
    machine = Machine(hardware_of("h800"), soft or software.of_date(202604), constants)
    return plan_step(workload, machine, schedule, weights_of(cfg.model, workload))


@pytest.fixture(scope="module")
def published() -> StepTime:
    """As `plan.software=deepseek` times it: weights in FP8 alone, moments in 16 bits (arXiv 2412.19437, 3.3.3)."""
    return planned(schedule="dualpipe", soft=software.deepseek_v3(), fp8_weights_only=True, moment_bytes=2)


def test_a_step_of_deepseek_v3_takes_as_long_as_published(published: StepTime) -> None:
    assert published.seconds == pytest.approx(STEP, rel=0.05)
    assert published.tokens_per_s_per_gpu == pytest.approx(1541.7, rel=0.05)
    assert sum(published.components.values()) == pytest.approx(published.seconds)


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_of_that_step(published: StepTime, name: str) -> None:
    assert published.components[name] == pytest.approx(COMPONENTS[name], rel=0.15)


def moe_layer(*overrides: str, soft: Software | None = None) -> tuple[float, float]:
    cfg = compose([*V3, *overrides])
    machine = Machine(hardware_of("h800"), soft or software.of_date(202604), FITTED)
    times = layer_times(workload_of(cfg, validate(cfg)), machine, moe=True)
    return total(times.forward), total(times.inputs) + total(times.weights) + total(times.recompute)


def test_tensor_parallel_latents_are_gathered_one_by_one() -> None:
    """MLA's latents of queries, of keys and values, and the rotary keys: two messages more than GQA in each direction,
    which count where a message takes long."""
    slow = replace(hardware_of("h800"), domain_latency_us=1e6)
    found = []
    for words in (["model.attention=mla"], ["model.attention=mla", "model.q_lora_rank=0"], ["model.attention=gqa"]):
        cfg = compose(["model=tiny", "parallel.tp=2", "runtime=cuda", "precision=bf16", *words])
        machine = Machine(slow, replace(software.of_date(202604), overlap_tp=False), FITTED)
        found.append(round(layer_times(workload_of(cfg, validate(cfg)), machine, moe=False).forward["tp"]))
    dense = 2  # a gather and a scatter
    assert found == [dense + 4, dense + 3, dense + 2]


def test_recomputation_adds_forward_work_to_the_backward_pass() -> None:
    none, full = moe_layer("recompute=none"), moe_layer("recompute=full")
    some = moe_layer()
    assert none[0] == some[0] == full[0]
    assert none[1] < some[1] < full[1]
    waits = 1e-6 * FITTED.flex_sync_us  # token counts are known the second time
    assert full[1] - none[1] == pytest.approx(none[0] - waits)


def test_full_recomputation_covers_the_layers_that_are_asked_for() -> None:
    """Every layer with uniform groups of any size; with blocks, the first layers of each pipeline stage."""

    def recomputed(*words: str) -> float:
        model = ("model=mixtral_8x7b", "runtime=cuda", "precision=bf16", "train.seq_length=4096", "parallel.pp=2")
        cfg = compose([*model, *words])
        workload = workload_of(cfg, validate(cfg))
        machine = Machine(hardware_of("h800"), software.of_date(202604), FITTED)
        return plan_step(workload, machine, "1f1b", weights_of(cfg.model, workload)).parts["recompute"]

    every = recomputed("recompute=full")  # 16 equal layers on each of the 2 stages, and neither embedding nor loss
    assert recomputed("recompute=full", "recompute.num_layers=4") == pytest.approx(every)
    for layers in (1, 4, 16):
        found = recomputed("recompute=full", "recompute.method=block", f"recompute.num_layers={layers}")
        assert found == pytest.approx(every * layers / 16)


def test_the_backward_passes_of_all_chunks_of_a_rank_hide_its_gradients() -> None:
    """Chunks divide the same work, so what the reduction takes beyond it stays the same."""
    slow = replace(hardware_of("h800"), domain_gb_per_s=0.5, network_gb_per_s=0.5)
    constants = replace(FITTED, dp_exposed=0.0, pass_us=0.0)
    exposed = []
    for schedule, chunks in (("1f1b", 1), ("interleaved", 4)):
        words = ["model=mixtral_8x7b", "runtime=cuda", "precision=bf16", "train.seq_length=4096", "parallel.dp=2"]
        cfg = compose([*words, "parallel.pp=2", f"parallel.vpp={chunks}"])
        workload = workload_of(cfg, validate(cfg))
        machine = Machine(slow, replace(software.of_date(202604), overlap_dp=True), constants)
        found = plan_step(workload, machine, schedule, weights_of(cfg.model, workload))
        exposed.append(found.data_parallel)
    assert exposed[0] > 1.0
    assert exposed[1] == pytest.approx(exposed[0], rel=0.002)


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "hidden"),
    [("1f1b", 1, 1, True), ("1f1b", 2, 1, False), ("interleaved", 2, 2, True), ("zb1p", 2, 1, False)],
)
def test_where_dispatch_hides_behind_another_micro_batch(schedule: str, pp: int, vpp: int, hidden: bool) -> None:
    """Where passes of two micro-batches lie side by side: chunks that interleave, or no pipeline."""
    cfg = compose(["model=mixtral_8x7b", "runtime=cuda", "precision=bf16", f"parallel.pp={pp}", f"parallel.vpp={vpp}"])
    constants = replace(FITTED, all_to_all_exposed=0.25, straggler=0.0, host_us=0.0, pass_us=0.0)
    soft = replace(software.of_date(202604), overlap_all_to_all=True, communication_sms=0.0, graphs="none")
    times = Times()
    times.add("gemm", 4.0, 5.0, 3.0)
    times.add("all_to_all", 2.0, 1.0)
    workload, machine = workload_of(cfg, validate(cfg)), Machine(hardware_of("h800"), soft, constants)
    found = stage_time(workload, machine, schedule, times)
    share = 0.25 if hidden else 1.0
    assert (found.forward, found.backward, found.weights) == pytest.approx((4 + 2 * share, 8 + share, 3))


def test_sharded_weights_cross_the_network_three_times() -> None:
    """FSDP gathers them for both passes, and scatters their gradients. Where that takes far longer than compute, a
    network of half the rate adds as much again. Weights in 16 bits; each of 4 ranks holds a quarter."""
    cfg = compose(["model=mixtral_8x7b", "runtime=cuda", "precision=bf16", "parallel.dp=4", "parallel.ep=1"])
    workload, soft = replace(workload_of(cfg, validate(cfg)), fsdp=True), software.of_date(202604)
    weights = weights_of(cfg.model, workload)[0]
    found = []
    for rate in (1e-2, 2e-2):
        hardware = replace(hardware_of("h800"), domain_gb_per_s=rate, domain_fraction=1.0)
        found.append(plan_step(workload, Machine(hardware, soft, FITTED), "1f1b", [weights]).parts["fsdp"])
    gathered = 2 * (weights.shared + weights.experts) * 3 / 4
    expected = 3 * gathered * (1 / 1e7 - 1 / 2e7) * workload.micro_batches
    assert found[0] - found[1] == pytest.approx(expected, rel=1e-6)


def test_multi_token_prediction_projects_two_hidden_states_to_one() -> None:
    """Beyond a layer, the embedding and the head, it has one linear layer [2 hidden, hidden]."""
    cfg = compose(["model=deepseek_v3", "parallel=deepseek_v3_h800", "batch=large", "runtime=cuda", "precision=bf16"])
    workload, machine = workload_of(cfg, validate(cfg)), Machine(hardware_of("h800"), software.of_date(202604), FITTED)
    layer, loss = layer_times(workload, machine, moe=True), loss_times(workload, machine)
    rest = layer.forward["gemm"] + loss.forward["gemm"]
    projection = kernels.gemm(machine.hardware, FITTED, "bf16", workload.tokens, 7168, 2 * 7168)
    assert mtp_times(workload, machine, layer, loss).forward["gemm"] - rest == pytest.approx(projection)


def test_fp8_dispatch_and_nodes_make_dispatch_shorter() -> None:
    fast = software.of_date(202604)
    base = moe_layer(soft=fast)[0]
    assert moe_layer(soft=replace(fast, fp8_dispatch=True))[0] < base
    assert moe_layer(soft=replace(fast, dispatcher="alltoall"))[0] > base
    assert moe_layer(soft=replace(fast, imbalance=1.3))[0] > base


def test_gathers_of_sharded_weights_overlap_with_compute() -> None:
    """FSDP adds what its gathers take beyond compute, and needs no reduction at the end of the step."""
    fast = software.of_date(202604)
    plain, sharded = planned(soft=fast), planned(soft=fast, fsdp=True)
    assert sharded.data_parallel == 0 < plain.data_parallel
    assert sharded.parts["fsdp"] > 0
    assert sharded.seconds > plain.seconds
    assert planned(soft=fast, frozen=True).seconds < plain.seconds  # no weight gradients


def test_experts_in_one_node_need_no_network() -> None:
    assert moe_layer("parallel.ep=8")[0] < moe_layer("parallel.ep=64")[0]


def test_an_estimate_is_close_to_the_simulation() -> None:
    cfg = compose(V3)
    workload: Workload = workload_of(cfg, validate(cfg))
    machine = Machine(hardware_of("h800"), software.of_date(202604), FITTED)
    weights = weights_of(cfg.model, workload)
    for schedule in ("1f1b", "zb1p", "dualpipe"):
        simulated, estimated = (
            plan_step(workload, machine, schedule, weights, simulated=s).seconds for s in (True, False)
        )
        assert estimated == pytest.approx(simulated, rel=0.1), schedule


def test_larger_micro_batches_have_more_tokens() -> None:
    one, two = planned(), planned("batch.micro_batch_size=2")
    assert one.tokens == two.tokens == 15360 * 4096
    assert two.pipeline.bubble_fraction > one.pipeline.bubble_fraction


def test_every_generation_of_software_is_known() -> None:
    assert software.of_date(202104).flash_attention is False
    assert software.of_date(202301).overlap_tp is False
    assert software.of_date(190001) == software.of_date(202000)
    assert {one.era for one in software.GENERATIONS.values()} == {2023, 2025, 2026}


def test_attention_of_2024_is_slower_on_heads_of_two_sizes() -> None:
    """DeepSeek's system had no kernel newer than FlashAttention-2 for them."""
    old = software.deepseek_v3()
    attention = [planned(schedule="dualpipe", soft=one).parts["attention"] for one in (old, replace(old, flash2=False))]
    h800, work = hardware_of("h800"), (3 * 192 + 2 * 128) / (192 + 128)  # five products of a backward pass for two
    fastest = 1 / h800.attention_fraction + work / h800.attention_backward_fraction
    assert attention[0] / attention[1] == pytest.approx((1 + work) / h800.flash2_fraction / fastest)


def layer_parts(*overrides: str, soft: Software | None = None, **changes: object) -> Times:
    cfg = compose(["model=mixtral_8x7b", "runtime=cuda", "precision=bf16", "train.seq_length=16384", *overrides])
    machine = Machine(hardware_of("h800"), soft or software.of_date(202604), FITTED)
    return layer_times(replace(workload_of(cfg, validate(cfg)), **changes), machine, moe=False)


def test_blocks_of_a_context_parallel_ring_are_put_together() -> None:
    """Per rank as much attention as without, slower on shorter blocks, and copies and sums that grow with the ring."""
    one, two, four = (layer_parts(f"parallel.cp={cp}") for cp in (1, 2, 4))
    assert one.forward["attention"] / 2 < two.forward["attention"] < 1.1 * one.forward["attention"] / 2
    extra = [times.forward["memory"] - one.forward["memory"] / cp for times, cp in ((two, 2), (four, 4))]
    assert extra[0] > 0
    # elements of queries and outputs 4,096, of keys and values 2,048: both copied once, outputs added up
    first, further = 2 * 2048 + 2 * 4096, 9 / 4 * 4096
    assert extra[1] / extra[0] == pytest.approx((first + 3 * further) / 4 / ((first + further) / 2))
    assert four.kernels_forward > two.kernels_forward > one.kernels_forward


def test_latents_that_are_gathered_leave_one_block() -> None:
    own = software.deepseek_v3()
    found = []
    for soft in (own, replace(own, latent_exchange=False)):
        cfg = compose([*V3, "parallel.cp=8", "parallel.dp=16", "train.seq_length=32768", LONG])
        found.append(
            layer_times(workload_of(cfg, validate(cfg)), Machine(hardware_of("h800"), soft, FITTED), moe=False)
        )
    gathered, ring = found
    assert gathered.forward["attention"] < ring.forward["attention"]
    assert gathered.forward["memory"] < ring.forward["memory"]
    assert gathered.forward["cp"] < ring.forward["cp"]


def test_gradients_in_16_bits_are_added_up_faster() -> None:
    """Each weight's gradient is read and written, in the bytes that it has."""
    four, two = (sum(layer_parts(grad_bytes=size).weights.values()) for size in (4, 2))
    model = compose(["model=mixtral_8x7b"]).model
    weights = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * model.ffn_hidden_size
    assert four - two == pytest.approx(2 * 2 * weights / hardware_of("h800").memory_bytes_per_s)


def test_every_pass_of_a_chunk_begins_a_little_later() -> None:
    """Not where one CUDA graph runs the whole step."""
    late = replace(FITTED, pass_us=FITTED.pass_us + 1000)
    for graphs, more in (("none", 1e-3), ("full", 0.0)):
        soft = replace(software.of_date(202604), graphs=graphs)
        before, after = (planned(soft=soft, constants=constants).stages[1] for constants in (FITTED, late))
        assert after.forward - before.forward == pytest.approx(more)
        assert after.backward - before.backward == pytest.approx(more)


def test_the_optimizer_moves_what_one_can_count() -> None:
    """dp=4, ep=2: a rank has 100 / 4 of the shared parameters and 40 / 2 of the experts'. Each is read and written in
    4 + 4 x 4 + 8 + 2 bytes, twice; new weights of 140 are read and written in 2."""
    one, machine = small.workload(small.GQA, {"dp": 4, "ep": 2}), small.machine()
    assert optimizer_seconds(one, machine, Weights(100, 40)) == pytest.approx(2 * 30 * 45 + 2 * 2 * 140)
    whole = replace(one, distributed_optimizer=False)
    assert optimizer_seconds(whole, machine, Weights(100, 40)) == pytest.approx(2 * 30 * 140 + 2 * 2 * 140)
    assert optimizer_seconds(replace(one, frozen=True), machine, Weights(100, 40)) == 0


def test_gradients_and_parameters_travel_as_one_can_count() -> None:
    """Gradients of 4 bytes: 3/4 of 400 and 1/2 of 160 bytes leave a rank, 380; weights of 2 bytes 190."""
    one, held = small.workload(small.GQA, {"dp": 4, "ep": 2}), Weights(100, 40)
    alone = small.machine(replace(small.SOFTWARE, overlap_dp=False))
    assert data_parallel_seconds(one, alone, held, 100.0) == pytest.approx(380 + 190)
    # All-reduces instead: scattered and gathered, and no parameters.
    assert data_parallel_seconds(replace(one, distributed_optimizer=False), alone, held, 100.0) == pytest.approx(760)
    # A backward pass of 100 s hides gradients, and a forward pass of half of that hides parameters.
    assert data_parallel_seconds(one, small.machine(), held, 100.0) == pytest.approx(280 + 140)
    assert data_parallel_seconds(one, small.machine(dp_exposed=0.1), held, 1e6) == pytest.approx(57)


PIPELINE = {"pp": 2, "dp": 4, "ep": 2}
HALVES = [["E", "t"], ["t", "L"]]
DENSE = replace(small.GQA, num_experts=0)


@pytest.mark.parametrize(
    ("schedule", "domain_gpus", "seconds"),
    [("1f1b", 8, 320.0), ("zb1p", 8, 80.0), ("1f1b", 4, 640.0), ("1f1b", 7, 640.0)],
)
def test_a_hop_between_stages_is_one_message(schedule: str, domain_gpus: int, seconds: float) -> None:
    """16 x 10 x 2 bytes to a rank that is 4 away: within a domain of 8 GPUs at 1 byte/s, else at half of that. A
    quarter is exposed where messages overlap, as they do in all schedules but 1F1B."""
    hardware = replace(small.HARDWARE, domain_gpus=domain_gpus, network_gb_per_s=0.5e-9)
    machine = Machine(hardware, small.SOFTWARE, replace(small.CONSTANTS, pp_exposed=0.25))
    one = small.workload(DENSE, {"pp": 2, "dp": 4}, stages=HALVES, micro_batches=6)
    found = plan_step(one, machine, schedule, [Weights(100, 0)] * 2)
    assert found.pipeline.seconds == pytest.approx(step_time(schedule, 2, 1, 6, found.stages, seconds).seconds)


def test_a_step_waits_for_the_rank_with_most_weights() -> None:
    one = small.workload(small.GQA, PIPELINE, stages=HALVES, micro_batches=6)
    machine = small.machine(replace(small.SOFTWARE, overlap_dp=False), step_s=7.0)
    found = plan_step(one, machine, "1f1b", [Weights(10, 0), Weights(100, 40)])
    assert (found.optimizer, found.data_parallel, found.step_end) == (pytest.approx(3260), pytest.approx(570), 7.0)
    assert found.seconds == pytest.approx(found.pipeline.seconds + 3260 + 570 + 7)


def test_the_second_half_of_dualpipev_comes_back_over_the_ranks() -> None:
    """Chunks are given rank by rank; the third stage is on the last rank, and the fourth on the first."""
    chunks = [["E", "t"], ["t"], ["L"], ["t", "t", "t"]]
    five = replace(DENSE, num_layers=5)
    one = small.workload(five, {"pp": 2, "vpp": 2}, stages=chunks, micro_batches=6)
    found = plan_step(one, small.machine(), "dualpipev", [Weights(100, 0)] * 2)
    assert found.stages[2].forward == pytest.approx(3 * found.stages[1].forward)
    assert found.stages[3].forward == pytest.approx(total(loss_times(one, small.machine()).forward))


@pytest.mark.parametrize(("graphs", "forward", "backward"), [("none", 18, 31), ("scoped", 15.75, 28), ("full", 10, 20)])
def test_graphs_start_kernels_in_a_part_of_the_time(graphs: str, forward: float, backward: float) -> None:
    """8 and 11 kernels of 1 s each, of which 3 and 4 within the scope of the graphs take a quarter."""
    machine = small.machine(replace(small.SOFTWARE, graphs=graphs), host_us=1e6, graph_kernels=0.25)
    times = Times({"gemm": 10.0}, {"gemm": 20.0}, {}, {}, 8.0, 11.0, 3.0, 4.0)
    found = stage_time(small.workload(DENSE), machine, "1f1b", times)
    assert (found.forward, found.backward) == (pytest.approx(forward), pytest.approx(backward))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fp8": "block", "bf16_layers": frozenset({0, 7})},
        {"recompute": "full", "recompute_method": "block"},
        {"recompute_of_chunks": (("none", frozenset()), ("none", frozenset()), ("full", frozenset()))},
        {"fsdp": True},
    ],
    ids=str,
)
def test_stages_share_parts_only_where_nothing_differs(changes: dict[str, object]) -> None:
    """Dense layers first, embedding, loss and multi-token prediction at the ends, and two stages that are alike."""
    model = replace(small.GQA, num_layers=10, num_dense_layers=3, mtp_num_layers=1)
    stages = [["E", "t", "t"], ["t", "t"], ["t", "t"], ["t", "t"], ["t", "t", "m", "L"]]
    job = small.workload(model, {"pp": 5, "dp": 2}, stages=stages, **changes)
    weights = [Weights(10 + rank // 3, 20) for rank in range(5)]
    parts = stage_parts(job, small.machine(), weights, {})
    for rank, items in enumerate(stages):
        first = sum(stage.count("t") for stage in stages[:rank])
        layers = range(first, first + items.count("t"))
        expected = parts_of_stage(job.of_chunk(rank), small.machine(), items, layers, {})
        if job.fsdp:
            gather_weights(job, small.machine(), expected, weights[rank])
        assert parts[rank] == expected, rank
    assert (parts[2] is parts[3]) == (not changes or job.recompute == "full")
