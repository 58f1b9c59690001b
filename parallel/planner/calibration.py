"""The constants of the time model that no data sheet gives, fitted by `python -m bench.fit_planner`. No torch import.

They were fitted on the fitting part of the published runs (`tools.planning.split`): about two thirds of the configurations,
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
        quantize_passes: times that a tensor passes memory on its way to FP8, of those counted.
        memory_passes: the same of norms, activations, residuals and permutations.
        attention_half: tokens of a sequence at which attention reaches half of its speed.
        attention_backward: time of attention's backward pass over its forward pass.
        tp_exposed: part of tensor-parallel collectives that is not hidden behind compute.
        cp_exposed: the same of context parallelism.
        dp_exposed: the same of gradient reduction and parameter gathering where they overlap.
        fsdp_exposed: the same of FSDP's gathers beyond the compute they overlap with.
        all_to_all_exposed: the same of expert dispatch where it overlaps with another micro-batch.
        pp_exposed: part of pipeline messages that is not hidden where they overlap.
        host_us: host time to start one kernel, microseconds.
        real_imbalance: tokens of the fullest expert rank over the mean where routing is learned, not forced to be even.
        graph_kernels: part of the kernels that the host still starts where CUDA graphs start the others.
        step_s: fixed time of a step (gradient norm, logging, synchronisation), seconds.
        straggler: how much longer a step takes for each doubling of the GPUs.
    """

    gemm_half_k: float = 128.0
    gemm_speed: float = 1.0
    quantize_passes: float = 1.0
    memory_passes: float = 1.0
    attention_half: float = 512.0
    attention_backward: float = 2.5
    tp_exposed: float = 0.5
    cp_exposed: float = 0.3
    dp_exposed: float = 0.1
    fsdp_exposed: float = 1.0
    all_to_all_exposed: float = 0.2
    pp_exposed: float = 0.2
    host_us: float = 4.0
    real_imbalance: float = 1.2
    graph_kernels: float = 0.4
    step_s: float = 0.05
    straggler: float = 0.005


FITTED = Calibration()
