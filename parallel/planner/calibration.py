"""The constants of the time model that no data sheet gives, fitted by `python -m bench.fit_planner`. No torch import.

They were fitted on the fitting part of the published runs (`tools.published.split`): about two thirds of the
configurations, chosen by a hash of the configuration; the rest tests them. They hold for every row: none belongs to a
model, a source or a row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """Constants of the time model.

    Args:
        gemm_half_k: inner size at which a GEMM's main loop is half of its time.
        gemm_speed: factor on the achieved peak of GEMMs. Above 1, since the peak was measured with tiles and waves that
            are counted here once more; and what it is too high for weight gradients, `weights_speed` takes back.
        power_exponent: how GEMMs follow the GPU's power limit, from the one under which they were measured.
        weights_speed: speed of a GEMM for weight gradients over that of one forward.
        block_speed: speed of FP8 products with scaled blocks over those with one scale.
        quantize_passes: times that a tensor passes memory when it is cast to FP8, of those counted.
        memory_passes: the same of norms, activations, residuals and permutations.
        scores_passes: how many times as often the scores of attention do, where they are written at all.
        expert_passes_2023, expert_passes_2025, expert_passes_2026: the same of routing, permutation, activation and
            casts of routed experts: in software of 2023, from June 2025 and from November 2025 on.
        small_kernel_us: device time of a kernel that has next to nothing to do, microseconds.
        attention_speed: factor on the achieved peaks of attention.
        tp_exposed: part of tensor-parallel collectives that is not hidden behind compute.
        dp_exposed: the same of gradient reduction and parameter gathering where they overlap.
        fsdp_exposed: the same of FSDP's gathers beyond the compute they overlap with.
        all_to_all_exposed: the same of expert dispatch where it overlaps with another micro-batch.
        pp_exposed: part of point-to-point communication between stages that is not hidden where it overlaps.
        pass_us: time between two passes of a micro-batch through a chunk, microseconds: send/recv between
            stages is started, the next pass is chosen; not where one CUDA graph runs the whole step.
        host_us: host time to start one kernel, microseconds.
        sync_us: host time that a layer loses where it must know how many tokens came before it continues (alltoall
            without fixed shapes), microseconds.
        flex_sync_us: the same of DeepEP and HybridEP.
        host_blend: how sharply a stage goes over from being bound by the accelerator to being bound by its host (1: the
            two add up); set, not fitted.
        sync_blend: the same where layers wait for token counts.
        capacity_us: device time in which a layer chooses the tokens that fit into the capacity of its experts (top-k
            and sort over all tokens, which nothing fuses), microseconds.
        real_imbalance: tokens of the most loaded expert rank over the mean, unless routing is forced to be even.
        graph_kernels: host time of a kernel within the scope of CUDA graphs over that of one outside.
        grouped_kernel: host time of one expert's kernel in a grouped product over that of a kernel of its own.
        overlap_host: factor on the host's time where dispatch overlaps with another micro-batch, whose layers it then
            starts piece by piece, without CUDA graphs.
        step_s: fixed time of a step (gradient norm, logging, synchronisation), seconds.
        straggler: how much longer every pass takes for each doubling of the GPUs.
    """

    gemm_half_k: float = 41.42
    gemm_speed: float = 1.101
    power_exponent: float = 0.8602
    weights_speed: float = 0.5833
    block_speed: float = 0.9251
    quantize_passes: float = 1.476
    memory_passes: float = 1.14
    scores_passes: float = 0.101
    expert_passes_2023: float = 0.3065
    expert_passes_2025: float = 2.491
    expert_passes_2026: float = 1.24
    small_kernel_us: float = 1.213
    attention_speed: float = 1.072
    tp_exposed: float = 0.6591
    dp_exposed: float = 0.02283
    fsdp_exposed: float = 0.9287
    all_to_all_exposed: float = 0.5
    pp_exposed: float = 0.1848
    pass_us: float = 119.6
    host_us: float = 32.38
    sync_us: float = 1693
    flex_sync_us: float = 45.79
    host_blend: float = 4
    sync_blend: float = 1.945
    capacity_us: float = 314.1
    real_imbalance: float = 1.513
    graph_kernels: float = 0.05034
    grouped_kernel: float = 0.9324
    overlap_host: float = 1.627
    step_s: float = 0.09186
    straggler: float = 0.01019

    def expert_passes(self, era: int) -> float:
        """That of software of an era (`Software.era`)."""
        passes: float = getattr(self, f"expert_passes_{era}")
        return passes


FITTED = Calibration()
