"""Prediction for a published run: throughput, step time, memory of the fullest GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moe_train.config.model import ModelConfig
from moe_train.model.arithmetic import flops_per_token
from moe_train.model.memory import weights_of_stage
from parallel import pipeline
from parallel.layout import ParallelLayout
from parallel.planner.calibration import Calibration
from parallel.planner.layer_time import Machine
from parallel.planner.memory import Weights, logits_bytes, stage_memory
from parallel.planner.schedules import impossible
from parallel.planner.search import held_bytes
from parallel.planner.step_time import StepTime, plan_step
from parallel.planner.workload import Job
from parallel.suggest import Impossible
from tools.published.rows import Row, number, text_of

# From the least work to the most.
RECOMPUTE: tuple[tuple[str, str, int, frozenset[str]], ...] = (
    ("none", "uniform", 1, frozenset()),
    ("selective", "uniform", 1, frozenset({"moe_act"})),
    ("selective", "uniform", 1, frozenset({"mla_up_proj"})),
    ("selective", "uniform", 1, frozenset({"layernorm", "moe_act"})),
    ("selective", "uniform", 1, frozenset({"layernorm", "moe_act", "mla_up_proj"})),
    ("selective", "uniform", 1, frozenset({"layernorm", "moe_act", "mla_up_proj", "mlp"})),
    ("selective", "uniform", 1, frozenset({"mlp"})),
    ("full", "uniform", 1, frozenset()),
)

# Bytes that torch's own cross entropy, with which torchtitan trains, holds of one score in its backward pass. Eager:
# log-probabilities, their gradient and that of the scores, each fp32 (aten's nll_loss_backward and
# log_softmax_backward). Compiled into one kernel: scores and their gradient in fp32, and the latter in 16 bits.
TORCH_LOSS = {"eager": 12, "compiled": 10}


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a row."""

    step: StepTime
    job: Job
    memory_bytes: float
    fits: bool

    @property
    def recompute(self) -> str:
        """The recomputation that was published or chosen."""
        return "+".join(sorted(self.job.recompute_modules)) or self.job.recompute


def predict(row: Row, constants: Calibration, simulated: bool = True) -> Prediction:
    """The fastest of what the row leaves open that fits memory; where nothing fits, the one that needs least."""
    best: Prediction | None = None
    smallest: Prediction | None = None
    is_open = row.open_vpp
    for job in candidates(row):
        weights = weights_of(row.model, job)
        size = memory_of(row, job, weights)
        fits = size <= row.hardware.usable_bytes
        if best is not None and not fits:
            continue
        if fits or smallest is None or size < smallest.memory_bytes:
            one = Prediction(timed(row, job, weights, constants, simulated and not is_open), job, size, fits)
            if fits and (best is None or one.step.seconds / one.step.tokens < best.step.seconds / best.step.tokens):
                best = one
            if smallest is None or size < smallest.memory_bytes:
                smallest = one
        if best is not None and not is_open:
            break  # candidates come in the order of the work they recompute
    chosen = best or smallest
    if chosen is None:
        raise Impossible("the row has no candidate")
    if is_open and simulated:
        chosen = replace(chosen, step=timed(row, chosen.job, weights_of(row.model, chosen.job), constants))
    return chosen


def timed(row: Row, job: Job, weights: list[Weights], constants: Calibration, simulated: bool = True) -> StepTime:
    """Time of a step. Where the micro-batches do not fill the interleaved schedule's rounds, of the next number that
    does."""
    schedule = row.schedule or ("interleaved" if job.layout.vpp > 1 else "1f1b")
    machine = Machine(row.hardware, row.software, constants)
    if impossible(schedule, job.layout.pp, job.layout.vpp, job.micro_batches):
        job = replace(job, micro_batches=-(-job.micro_batches // job.layout.pp) * job.layout.pp)
    return plan_step(job, machine, schedule, weights, simulated)


def candidates(row: Row) -> Iterator[Job]:
    """Every job that fits what is published, those that recompute least first."""
    sequences = row.micro_batch_size * row.micro_batches
    sizes = [row.micro_batch_size]
    chunks = [row.layout.vpp]
    if row.open_vpp and row.layout.pp > 1:
        chunks = [v for v in (1, 2, 3, 4, 6, 8) if row.model.num_layers // (row.layout.pp * v) >= 1]
    for recompute in [row.recompute] if row.recompute else possible(row.model):
        for vpp in chunks:
            for size in sizes:
                if job := _job(row, replace(row.layout, vpp=vpp), size, sequences // size, recompute):
                    yield job


def possible(model: ModelConfig) -> list[tuple[str, str, int, frozenset[str]]]:
    """The sets of `RECOMPUTE` that change anything of this model, each once."""
    found = []
    for mode, method, layers, modules in RECOMPUTE:
        if model.attention != "mla":
            modules = modules - {"mla_up_proj"}
        if not model.is_moe:
            modules = modules - {"moe_act"}
        if 0 not in model.moe_layer_pattern:
            modules = modules - {"mlp"}
        one = (mode, method, layers, modules)
        if (mode != "selective" or modules) and one not in found:
            found.append(one)
    return found


def _job(
    row: Row, layout: ParallelLayout, size: int, micro_batches: int, recompute: tuple[str, str, int, frozenset[str]]
) -> Job | None:
    model, fp8 = row.model, row.precision if row.precision in ("block", "tensor", "mxfp8") else None
    if row.precision == "nvfp4":
        fp8 = "mxfp8"
    try:
        stages = pipeline.stage_items(None, layout.pp, layout.vpp, model.num_layers, model.mtp_num_layers)
    except Impossible:
        return None
    mode, method, layers, modules = recompute
    words = text_of(row.values).lower()
    recent = row.month >= 202406
    return Job(
        model=model, layout=layout, stages=stages, micro_batch_size=size, seq_length=row.seq_length,
        micro_batches=micro_batches, sequence_parallel=row.sequence_parallel, backend="te", fused=True, grouped=True,
        dtype="bf16", fp8=fp8, fp8_weights_only=fp8 is not None, grad_bytes=4 if row.schedule or not recent else 2,
        compact=row.schedule == "dualpipe",
        moment_bytes=2 if row.schedule == "dualpipe" or "bf16 moments" in words else 4,
        distributed_optimizer=recent or row.software.fsdp, recompute=mode, recompute_method=method,
        recompute_num_layers=layers, recompute_modules=modules,
    )  # fmt: skip


def weights_of(model: ModelConfig, job: Job) -> list[Weights]:
    """Parameters on one rank of each pipeline rank."""
    return [weights_of_stage(model, job, rank) for rank in range(job.layout.pp)]


def memory_of(row: Row, job: Job, weights: list[Weights]) -> float:
    """Memory of the fullest rank, bytes."""
    if row.schedule == "dualpipe":
        return max(held_bytes(job, row.schedule, [stage_memory(job, rank, one) for rank, one in enumerate(weights)]))
    layout, sizes = job.layout, []
    for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1}):  # the fullest is one of these
        one = stage_memory(job, stage, weights[stage])
        size = float(one.total)
        if row.software.fsdp:
            size += _fully_sharded(job, weights[stage]) - one.parameters - one.gradients
            if stage == layout.pp - 1 and "torchtitan" in row.values["source"]:
                size += _torch_loss(row, job) - logits_bytes(job, "L")
        if row.software.frozen:
            size -= one.gradients + one.optimizer
        sizes.append(size)
    return max(sizes)


def _fully_sharded(job: Job, weights: Weights) -> float:
    """Weights and gradients under FSDP, bytes: fp32 shards of both, and what is gathered at once.

    With a pipeline the whole stage stays gathered between its micro-batches, gradients too; else two layers of it.
    """
    layout, held = job.layout, weights.shared + weights.experts
    shards = 8 * (weights.shared / (layout.dp * layout.cp) + weights.experts / layout.edp)
    layers = max(1, len(job.model.moe_layer_pattern) // layout.pp)
    return shards + (job.element + 4) * held * (1.0 if layout.pp > 1 else min(1.0, 2 / layers))


def _torch_loss(row: Row, job: Job) -> float:
    """What torch's own loss holds in its backward pass, bytes, where Megatron-Core's would not have split it."""
    score = TORCH_LOSS["compiled" if "compile" in text_of(row.values) else "eager"]
    return score * job.tokens * job.model.padded_vocab_size / job.layout.tp


def published_tokens_per_s(row: Row) -> float | None:
    """Tokens/s/GPU as published, or from TFLOPS or MFU by the source's convention."""
    values, words = row.values, text_of(row.values).lower()
    tokens, tflops, mfu = (number(values[name]) for name in ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct"))
    if tokens is not None and not ("use tflops" in words and tflops is not None):
        return tokens
    if tflops is None and mfu is not None:
        tflops = mfu / 100 * row.hardware.bf16_tflops
    if tflops is None:
        return None
    return tflops * 1e12 / published_flops(row, words)


def published_flops(row: Row, words: str) -> float:
    """FLOPs of a token by the convention of the source: before 2025.04 Megatron did not count causality."""
    causal = "non-causal" not in words and (re_causal(words) or row.month >= 202504)
    hidden = "hardware flops" in words
    counted = "mtp counted" in words and "not counted" not in words
    flops = flops_per_token(
        row.model, row.seq_length, causal and not hidden, counted and bool(row.model.mtp_num_layers)
    )
    return flops * (4 / 3 if hidden else 1)


def re_causal(words: str) -> bool:
    """Whether the source says that it counts causal attention."""
    return "causal" in words.replace("causal/non-causal not stated", "")


def published(values: Mapping[str, str]) -> dict[str, float | None]:
    """Step time, and memory in GB: some sources state GiB."""
    peak = number(values["peak_mem_gb"])
    if peak is not None and "memory GiB" in values["other_flags"]:
        peak *= 2**30 / 1e9
    return {"step_time_s": number(values["step_time_s"]), "peak_mem_gb": peak}
