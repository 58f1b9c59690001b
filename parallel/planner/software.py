"""What the software of a run adds to the mathematics: which kernels are fused, what overlaps, what the host costs.

The same layout runs at different speeds from one release to the next. What a run used is often published (a dispatcher,
CUDA graphs, whether expert dispatch overlaps); where only a date is known, `of_date` gives what was usual then. No
torch import.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.dispatchers import ALLTOALL, FLEX


@dataclass(frozen=True)
class Software:
    """How a training system runs a layer.

    Args:
        flash_attention: attention never writes its scores to memory.
        flash2: its kernel is FlashAttention-2, not the fastest of the GPU.
        era: how far kernels around experts are fused: as in 2023, June 2025 or November 2025 (called 2026;
            `Calibration.expert_passes`).
        graphs: CUDA graphs: none, scoped (attention, norms, router), or full (the whole step, which then waits for
            no token counts).
        ordered_scales: casts to MXFP8 write scales in the order in which products take them.
        fused_experts: the experts' activation function and its casts to FP8 are part of the products around it.
        dispatcher: alltoall (NCCL, one message for each expert), or flex (DeepEP, HybridEP: one for each node).
        fp8_dispatch: tokens are dispatched in FP8 and combined in 16 bits.
        overlap_all_to_all: dispatch runs during another micro-batch's compute.
        overlap_tp: tensor-parallel collectives run in pieces during their GEMM.
        overlap_dp: gradients are reduced during the backward pass, parameters gathered during the forward pass.
        latent_exchange: context parallelism passes the latents of multi-head latent attention, not keys and values.
        imbalance: tokens of the most loaded expert rank over the mean.
        communication_sms: part of the multiprocessors that dispatch takes from compute while both run.
    """

    flash_attention: bool = True
    flash2: bool = False
    era: int = 2026
    graphs: str = "none"
    ordered_scales: bool = False
    fused_experts: bool = False
    dispatcher: str = FLEX.name
    fp8_dispatch: bool = False
    overlap_all_to_all: bool = False
    overlap_tp: bool = True
    overlap_dp: bool = True
    latent_exchange: bool = False
    imbalance: float = 1.0
    communication_sms: float = 0.0


# First month (year x 100 + month) -> what a well-tuned Megatron run had from then on.
GENERATIONS = {
    202000: Software(flash_attention=False, dispatcher=ALLTOALL.name, overlap_tp=False, overlap_dp=False, era=2023),
    202301: Software(dispatcher=ALLTOALL.name, overlap_tp=False, era=2023),
    202406: Software(dispatcher=ALLTOALL.name, era=2023),
    202506: Software(era=2025),
    202511: Software(era=2026),
    202601: Software(ordered_scales=True, era=2026),
}


# CUDA graphs and overlap as the performance recipes of Megatron-Bridge set them (scripts/performance, releases 0.2 to
# 0.6), where most of them agree. On racks: graphs of attention and router, later of the whole step for MXFP8, with
# overlap and a fused feed-forward of the experts. On nodes of 8: overlap where chunks interleave, first of experts over
# several nodes; graphs of attention and router on Blackwell (MXFP8).
GRAPHS_FROM, NODE_GRAPHS_FROM, FULL_GRAPHS_FROM = 202511, 202604, 202606
OVERLAP_FROM, NODE_OVERLAP_FROM = 202506, 202511


def of_date(month: int) -> Software:
    """What was usual in a month, given as year x 100 + month."""
    known = [first for first in sorted(GENERATIONS) if first <= month]
    return GENERATIONS[known[-1] if known else min(GENERATIONS)]


def usual(month: int, domain_gpus: int, expert_gpus: int, vpp: int, recipe: str | None) -> Software:
    """The same for a layout.

    Args:
        month: year x 100 + month.
        domain_gpus: GPUs of an NVLink domain.
        expert_gpus: GPUs over which experts are spread; 1 where they are not, or where there are none.
        vpp: chunks of each pipeline rank.
        recipe: FP8 or FP4 recipe.
    """
    software = of_date(month)
    if expert_gpus == 1:
        return software
    if domain_gpus > 8:
        if month >= FULL_GRAPHS_FROM and recipe == "mxfp8":
            return replace(software, graphs="full", fused_experts=True, overlap_all_to_all=True)
        return replace(software, graphs="scoped" if month >= GRAPHS_FROM else "none")
    overlap_from = OVERLAP_FROM if expert_gpus > domain_gpus else NODE_OVERLAP_FROM
    scoped = month >= NODE_GRAPHS_FROM and recipe == "mxfp8"
    return replace(
        software, graphs="scoped" if scoped else "none", overlap_all_to_all=vpp > 1 and month >= overlap_from
    )  # fmt: skip


def deepseek_v3() -> Software:
    """DeepSeek's own system (arXiv 2412.19437, section 3.2): FP8 dispatch, 20 of 132 multiprocessors for it, DualPipe.

    The schedule ends with weight gradients on every rank, so that nothing hides their reduction. The rest is what was
    usual when it ran; no kernel newer than FlashAttention-2 took heads of 192 and 128 then.
    """
    return replace(
        of_date(202410), dispatcher=FLEX.name, fp8_dispatch=True, overlap_all_to_all=True, overlap_dp=False,
        communication_sms=20 / 132, latent_exchange=True, flash2=True,
    )  # fmt: skip
