"""The constants of the time model that no data sheet gives, fitted by `python -m bench.fit_planner`. No torch import.

They were fitted on the fitting part of the published runs (`tools.planning.split`): about two thirds of the
configurations,
chosen by a hash of the configuration; the rest tests them. They hold for every row: none belongs to a model, a source
or a row.
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
        real_imbalance: tokens of the fullest expert rank over the mean where routing is learned, not forced to be even.
        graph_kernels: part of the kernels that the host still starts where CUDA graphs start the others.
        step_s: fixed time of a step (gradient norm, logging, synchronisation), seconds.
        straggler: how much longer every pass takes for each doubling of the GPUs.
    """

    gemm_half_k: float = 54.66
    gemm_speed: float = 1.1
    weights_speed: float = 0.5566
    block_speed: float = 1
    flash2_speed: float = 0.3868
    quantize_passes: float = 1.53
    memory_passes: float = 1.763
    attention_speed: float = 1.2
    attention_half: float = 576.9
    attention_backward: float = 2.8
    tp_exposed: float = 0.2699
    cp_exposed: float = 1
    dp_exposed: float = 0.05989
    fsdp_exposed: float = 0.692
    all_to_all_exposed: float = 0.8
    pp_exposed: float = 0.8825
    host_us: float = 22.06
    sync_us: float = 1569
    flex_sync_us: float = 389.4
    real_imbalance: float = 1.6
    graph_kernels: float = 0.1
    step_s: float = 0.04638
    straggler: float = 0.004312


FITTED = Calibration()

# First month of a generation of software (year x 100 + month) -> part of the counted memory traffic of small kernels
# that
# fusion leaves, and part of the counted kernels that the host starts one by one (both may be above 1: the counts are
# of a lean implementation).
FUSION = {202000: 0.4, 202301: 2.5, 202406: 1.19, 202506: 1.54, 202601: 1.04, 202606: 1.04}
KERNELS = {202000: 0.67, 202301: 1, 202406: 0.268, 202506: 1.5, 202601: 1.2, 202606: 0.709}
