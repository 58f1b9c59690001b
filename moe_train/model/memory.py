"""Memory of a run from its typed config, through `parallel.planner`. Nothing here imports torch."""

from __future__ import annotations

import math

from moe_train.config.model import ModelConfig
from moe_train.config.quantities import batch_schedule
from moe_train.config.recompute import of_chunk
from moe_train.config.resolve import resolve
from moe_train.config.rules.precision import high_precision_layers, recipe
from moe_train.config.schema import Config
from moe_train.model.arithmetic import count_parameters, parameters_of_ranks
from parallel import pipeline
from parallel.layout import ParallelLayout
from parallel.planner.estimate import stage_memories
from parallel.planner.memory import StageMemory, Weights
from parallel.planner.workload import Workload


def predict(cfg: Config, layout: ParallelLayout) -> list[StageMemory]:
    """Memory of one rank of each pipeline stage, first to last. `cfg` is validated."""
    workload = workload_of(cfg, layout)
    return list(stage_memories(workload, weights_of(cfg.model, workload)))


def workload_of(cfg: Config, layout: ParallelLayout) -> Workload:
    """The workload of a step as moe-train runs `cfg`."""
    resolved = resolve(cfg, layout)
    model, precision, recompute = cfg.model, cfg.precision, cfg.recompute
    stages = pipeline.stage_items(
        cfg.parallel.pipeline_layout, layout.pp, layout.vpp, model.num_layers, model.mtp_num_layers
    )
    offloads = recompute.offload != "none"
    each = [of_chunk(recompute, chunk) for chunk in range(len(recompute.stages))]
    return Workload(
        model=model,
        layout=layout,
        stages=stages,
        micro_batch_size=cfg.batch.micro_batch_size,
        seq_length=cfg.train.seq_length,
        micro_batches=max(1, batch_schedule(cfg).last_size // resolved.data_ranks_batch),
        sequence_parallel=resolved.sequence_parallel,
        backend=resolved.backend,
        fused=resolved.fused,
        grouped=resolved.grouped,
        dtype=precision.dtype,
        # Emulation keeps 16 bits of everything.
        fp8=recipe(precision) if resolved.backend == "te" else None,
        bf16_layers=high_precision_layers(precision, model.num_layers),
        fp8_weights_only=precision.fp8_param_gather and resolved.backend == "te",
        grad_bytes=4 if precision.grad_reduce_fp32 or precision.dtype == "fp32" else 2,
        moment_bytes=4 if precision.moments_dtype == "fp32" else 2,
        distributed_optimizer=cfg.parallel.distributed_optimizer,
        recompute=recompute.mode,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        recompute_modules=frozenset(recompute.modules),
        recompute_of_chunks=tuple((one.mode, frozenset(one.modules)) for one in each),
        offload_modules=frozenset(recompute.offload_modules),
        offload_min_bytes=recompute.offload_min_bytes if offloads and resolved.backend == "local" else math.inf,
        frees_outputs=resolved.runtime == "cuda",
        on_cpu=resolved.runtime == "cpu",
    )


def checkpoint_bytes(cfg: Config, workload: Workload) -> float:
    """A whole checkpoint: weights, main weights and moments, once each."""
    each = workload.element + (0 if workload.dtype == "fp32" else 4) + 2 * workload.moment_bytes
    return each * count_parameters(cfg.model).total_with_mtp


def weights_of(model: ModelConfig, workload: Workload) -> list[Weights]:
    """Parameters on one rank of each pipeline rank, first to last."""
    layout = workload.layout
    ranks = parameters_of_ranks(
        model,
        workload.stages,
        pp=layout.pp,
        tp=layout.tp,
        ep=layout.ep,
        etp=layout.etp,
        bf16_layers=workload.bf16_layers,
    )
    return [Weights(counts.shared, counts.experts, counts.linear) for counts in ranks]
