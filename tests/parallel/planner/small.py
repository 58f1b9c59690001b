"""A layer so small that one can count what it moves, and a machine on which a byte takes a second."""

from __future__ import annotations

from dataclasses import replace

from moe_train.config.model import ModelConfig
from parallel.layout import ParallelLayout
from parallel.planner.calibration import Calibration
from parallel.planner.layer_time import Machine
from parallel.planner.software import Software
from parallel.planner.workload import Workload
from tools.published.clusters import hardware_of

# A byte through memory, over a link or over the network takes 1 s, and so does a FLOP of attention (half as fast
# backwards). GEMMs take no longer than the bytes that they move. A single unit has no tiles and no waves to fill.
HARDWARE = replace(
    hardware_of("local_cpu"), memory_tb_per_s=1e-12, memory_fraction=1.0, bf16_tflops=1e12, bf16_fraction=1.0,
    fp32_tflops=1e12, fp8_tflops=1e12, fp8_fraction=1.0, attention_fraction=1e-24, attention_backward_fraction=0.5e-24,
    domain_gb_per_s=1e-9, domain_fraction=1.0, domain_gpus=8, domain_latency_us=0.0, network_gb_per_s=1e-9,
    network_fraction=1.0, network_latency_us=0.0, pod_gpus=1024, spine_fraction=1.0, multiprocessors=1,
)  # fmt: skip
CONSTANTS = Calibration(
    gemm_half_k=0.0, gemm_speed=1.0, power_exponent=0.0, weights_speed=1.0, block_speed=1.0, quantize_passes=1.0,
    memory_passes=1.0, scores_passes=1.0, expert_passes_2023=1.0, expert_passes_2025=1.0, expert_passes_2026=1.0,
    small_kernel_us=0.0, attention_speed=1.0, tp_exposed=1.0, dp_exposed=0.0, fsdp_exposed=0.0, all_to_all_exposed=1.0,
    pp_exposed=1.0, pass_us=0.0, host_us=0.0, sync_us=0.0, flex_sync_us=0.0, host_blend=1.0, sync_blend=1.0,
    capacity_us=0.0, graph_kernels=0.0, grouped_kernel=1.0, overlap_host=1.0, step_s=0.0, straggler=0.0,
)  # fmt: skip
SOFTWARE = Software(dispatcher="alltoall")

GQA = ModelConfig(
    attention="gqa", hidden_size=10, num_attention_heads=4, num_query_groups=2, head_dim=6, qk_norm="none",
    ffn_hidden_size=12, moe_ffn_hidden_size=6, num_experts=4, topk=2, vocab_size=256, num_layers=2, mtp_num_layers=0,
)  # fmt: skip
MLA = replace(
    GQA, attention="mla", q_lora_rank=3, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=6, v_head_dim=5,
    head_dim=0, num_query_groups=0,
)  # fmt: skip


def machine(software: Software = SOFTWARE, **constants: float) -> Machine:
    """The machine, with some constants of its own."""
    return Machine(HARDWARE, software, replace(CONSTANTS, **constants))


def workload(model: ModelConfig, layout: dict[str, int] | None = None, **changes: object) -> Workload:
    """One sequence of 16 tokens in BF16; degrees that `layout` leaves out are 1."""
    degrees = dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp", "dp"), 1) | (layout or {})
    one = Workload(
        model=model, layout=ParallelLayout.resolve(**degrees), stages=[["E", "t", "t", "L"]], micro_batch_size=1,
        seq_length=16, micro_batches=3, sequence_parallel=False, backend="te", fused=False, grouped=True, dtype="bf16",
    )  # fmt: skip
    return replace(one, **changes)  # type: ignore[arg-type]
