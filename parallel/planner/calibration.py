"""The constants of the time model that no data sheet gives, fitted by `python -m bench.fit_planner`. No torch import.

They were fitted on the fitting part of the published runs (`tools.planning.split`): about two thirds of the
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
        gemm_speed: factor on the achieved peak of GEMMs.
        weights_speed: speed of a GEMM for weight gradients over that of one forward.
        block_speed: speed of FP8 products with scaled blocks over those with one scale.
        flash2_speed: speed of FlashAttention-2 over that of newer kernels on Hopper.
        quantize_passes: times that a tensor passes memory on its way to FP8, of those counted.
        memory_passes: the same of norms, activations, residuals and permutations.
        small_kernel_us: device time of a kernel that has next to nothing to do, microseconds.
        attention_speed: factor on the achieved peak of attention.
        attention_half: tokens of a sequence at which attention reaches half of its speed.
        attention_backward: time of attention's backward pass over its forward pass.
        tp_exposed: part of tensor-parallel collectives that is not hidden behind compute.
        cp_exposed: the same of context parallelism.
        dp_exposed: the same of gradient reduction and parameter gathering where they overlap.
        fsdp_exposed: the same of FSDP's gathers beyond the compute they overlap with.
        all_to_all_exposed: the same of expert dispatch where it overlaps with another micro-batch.
        pp_exposed: part of pipeline messages that is not hidden where they overlap.
        host_us: host time to start one kernel, microseconds.
        sync_us: host time that a layer loses where it must know how many tokens came before it goes on (alltoall
            without fixed shapes), microseconds.
        flex_sync_us: the same of DeepEP and HybridEP.
        host_blend: how sharply a stage goes over from being bound by the accelerator to being bound by its host (1: the
            two add up); set, not fitted.
        sync_blend: the same where layers wait for token counts.
        capacity_us: device time in which a layer chooses the tokens that fit into the capacity of its experts (top-k
            and sort over all tokens, which nothing fuses), microseconds.
        real_imbalance: tokens of the fullest expert rank over the mean where routing is learned, not forced to be even.
        graph_kernels: host time of a kernel within the scope of CUDA graphs over that of one outside.
        grouped_kernel: host time of one expert's kernel in a grouped product over that of a kernel of its own.
        overlap_host: factor on the host's time where dispatch overlaps with another micro-batch, whose layers it then
            starts piece by piece, without CUDA graphs.
        step_s: fixed time of a step (gradient norm, logging, synchronisation), seconds.
        straggler: how much longer every pass takes for each doubling of the GPUs.
    """

    gemm_half_k: float = 88.91
    gemm_speed: float = 1.093
    weights_speed: float = 0.6687
    block_speed: float = 0.9688
    flash2_speed: float = 0.4357
    quantize_passes: float = 0.8512
    memory_passes: float = 0.8819
    small_kernel_us: float = 1.002
    attention_speed: float = 1
    attention_half: float = 365.9
    attention_backward: float = 2.8
    tp_exposed: float = 0.5412
    cp_exposed: float = 1
    dp_exposed: float = 0.02378
    fsdp_exposed: float = 0.6223
    all_to_all_exposed: float = 0.4957
    pp_exposed: float = 0.08569
    host_us: float = 25
    sync_us: float = 1099
    flex_sync_us: float = 102
    host_blend: float = 4
    sync_blend: float = 2.089
    capacity_us: float = 1220
    real_imbalance: float = 1.6
    graph_kernels: float = 0.05195
    grouped_kernel: float = 0.5663
    overlap_host: float = 1.675
    step_s: float = 0.0638
    straggler: float = 0.01105


FITTED = Calibration()

# Speed of DeepSeek's own attention kernels of 2024 over FlashAttention-3: with it the hours of their context extension
# come out. FlashAttention-2 has 0.44 on Hopper.
DEEPSEEK_ATTENTION = 0.65

# First month of a generation of software (year x 100 + month) -> part of the counted memory traffic of small kernels
# that fusion leaves, and part of the counted kernels that the host starts one by one (both may be above 1: the counts
# are of a lean implementation).
FUSION = {202000: 0.427, 202301: 2.5, 202406: 1.4, 202506: 1.53, 202601: 1.19, 202606: 1.19}
KERNELS = {202000: 0.413, 202301: 0.513, 202406: 0.523, 202506: 1.75, 202601: 1.75, 202606: 1.75}
