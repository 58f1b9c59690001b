"""Memory of one rank of each pipeline stage, from the configuration alone. Pure functions; no torch import.

What is counted is what torch allocates: neither the CUDA context nor NCCL's own buffers, nor fragmentation.
Experts are taken to get equally many tokens; a rank whose experts get x % more has x % more of `expert_share`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.fp8_recipes import RECIPES
from parallel.planner.activations import (
    EXPERT_TENSORS,
    FP32,
    INDEX,
    Saved,
    layer,
    linear_input,
    norm,
    resident,
)
from parallel.planner.workload import Job

LONGEST_SIMULATION = 8  # rounds of pp micro-batches after which the interleaved schedule only repeats itself


@dataclass(frozen=True)
class Weights:
    """Parameters on one rank: outside of routed experts, in them, and those that linear layers multiply in FP8."""

    shared: int
    experts: int
    in_fp8: int = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of pipeline stage `stage`.

    Args:
        items: what the rank's chunks hold, such as ["Ett", "tt"].
        micro_batches_in_flight: forward passes whose activations are alive at once, over all chunks.
        activations_per_micro_batch: kept by one forward pass through every chunk of the rank, without logits.
        expert_share: part of `activations_per_micro_batch` that grows with the tokens of this rank's experts.
        activations: of all micro-batches in flight, at their peak.
        recompute: what one recomputed layer, or group of layers, brings back while its backward pass runs.
        communication: messages between stages that are held, dispatched tokens, gathered sequences.
        logits: fp32 scores that each loss keeps, and their 16-bit form while the loss is computed.
    """

    stage: int
    items: tuple[str, ...]
    parameters: int
    gradients: int
    optimizer: int
    micro_batches_in_flight: int
    activations_per_micro_batch: int
    expert_share: int
    activations: int
    recompute: int
    communication: int
    logits: int

    @property
    def total(self) -> int:
        """All of it at once: an upper bound, since the parts need not peak together."""
        static = self.parameters + self.gradients + self.optimizer
        return static + self.activations + self.recompute + self.communication + self.logits


def stage_memory(job: Job, stage: int, weights: Weights) -> StageMemory:
    """Memory of one rank of pipeline stage `stage`, which holds `weights`."""
    pp = job.layout.pp
    chunks = [chunk_activations(job, i) for i in range(stage, len(job.stages), pp)]
    in_flight = peak_in_flight(job, stage, [sum(chunk.values()) for chunk in chunks])
    activations = sum(count * sum(chunk.values()) for count, chunk in zip(in_flight, chunks, strict=True))
    items = tuple("".join(job.stages[i]) for i in range(stage, len(job.stages), pp))
    routed = [size for chunk in chunks for name, size in chunk.items() if EXPERT_TENSORS in name]
    return StageMemory(
        stage=stage,
        items=items,
        parameters=round(parameter_bytes(job, weights)),
        gradients=job.grad_bytes * (weights.shared + weights.experts),
        optimizer=round(optimizer_bytes(job, weights)),
        micro_batches_in_flight=sum(in_flight),
        activations_per_micro_batch=round(sum(sum(chunk.values()) for chunk in chunks)),
        expert_share=round(sum(routed)),
        activations=round(activations),
        recompute=round(max(_recomputed(job, i) for i in range(stage, len(job.stages), pp))),
        communication=round(communication_bytes(job, stage, items, sum(in_flight))),
        logits=round(logits_bytes(job, "".join(items))),
    )


def parameter_bytes(job: Job, weights: Weights) -> float:
    """Weights; in FP8 also the two copies, for the products with them and with their transpose, that layers cache."""
    whole = job.element * (weights.shared + weights.experts)
    if job.fp8 is None:
        return whole
    copies = 2 * RECIPES[job.fp8].element_bytes * weights.in_fp8
    return copies + whole - (job.element * weights.in_fp8 if job.fp8_weights_only else 0)


def optimizer_bytes(job: Job, weights: Weights) -> float:
    """Adam's moments and, for 16-bit weights, the fp32 main weights; a mean over the ranks that share them."""
    each = 2 * job.moment_bytes + (0 if job.dtype == "fp32" else FP32)
    if not job.distributed_optimizer:
        return each * (weights.shared + weights.experts)
    replicas = job.layout.dp * job.layout.cp
    return each * (weights.shared / replicas + weights.experts / job.layout.edp)


def chunk_activations(job: Job, index: int) -> Saved:
    """What the forward pass of one micro-batch through chunk `index` keeps, without what its loss keeps."""
    job, items = job.of_chunk(index), job.stages[index]
    first = sum(stage.count("t") for stage in job.stages[:index])
    pattern = job.model.moe_layer_pattern[first : first + items.count("t")]
    r, hidden, last = job.split_tokens, job.model.hidden_size, first + len(pattern)
    kept = _embedding(job, "embedding") if "E" in items else {}
    kept |= _layers(job, first, [bool(moe) for moe in pattern])
    depths = items.count("m")
    has_mtp = any("m" in stage for stage in job.stages)
    if (first < last == len(job.model.moe_layer_pattern)) if has_mtp else "L" in items:
        kept |= norm(job, "final norm", r, hidden, "final norm input")
    for depth in range(depths):
        kept |= {f"mtp {depth} {name}": size for name, size in _mtp(job).items()}
    if "L" in items:
        outputs = 1 + depths  # one tensor for all of them
        kept["output head input"] = job.element * r * hidden * outputs
    return resident(job, kept)


def _embedding(job: Job, name: str) -> Saved:
    mask = {f"{name}: mask": job.tokens} if job.layout.tp > 1 else {}
    return {f"{name}: token ids": INDEX * job.tokens, **mask}


def _layers(job: Job, first: int, moe: Sequence[bool]) -> Saved:
    """All layers of a chunk from number `first` on, with whole ones or groups of them recomputed in `full` mode."""
    r, hidden, size = job.split_tokens, job.model.hidden_size, job.recompute_num_layers
    kept: Saved = {}
    if moe and job.recompute == "full" and job.model.attention == "gqa":  # one tensor that every checkpoint keeps
        kept["rotary angles"] = FP32 * (job.seq_length // job.layout.cp) * job.model.rotary_dim
    for number, is_moe in enumerate(moe):
        if job.recompute == "full" and (job.recompute_method == "uniform" or number < size):
            if job.recompute_method == "block" or number % size == 0:
                kept[f"layer {number} input"] = job.element * r * hidden
            continue
        kept |= {f"layer {number} {name}": value for name, value in layer(job.of_layer(first + number), is_moe).items()}
    return kept


def _mtp(job: Job) -> Saved:
    """One multi-token-prediction depth (transformer/multi_token_prediction.py upstream)."""
    r, hidden, e = job.split_tokens, job.model.hidden_size, job.element
    kept = _embedding(job, "embedding")
    if job.recompute == "full" and job.recompute_method == "uniform":
        return kept | {"hidden states": e * r * hidden, "next embedding": e * r * hidden}
    kept |= norm(job, "embedding norm", r, hidden, "next embedding")
    kept |= norm(job, "hidden norm", r, hidden, "hidden states")
    kept |= linear_input(job, "projection input", r, 2 * hidden)
    inside = layer(job, bool(job.model.moe_layer_pattern[-1]))
    if "input" in inside:  # a slice of the gathered projection, which it keeps alive
        inside["input"] = e * job.tokens * hidden
    kept |= inside
    return kept | norm(job, "final norm", r, hidden, "final norm input")


def saved_per_micro_batch(job: Job, stage: int) -> float:
    """Bytes that one forward pass through all chunks of a rank keeps for its backward pass, logits included."""
    kept = 0.0
    for index in range(stage, len(job.stages), job.layout.pp):
        kept += sum(chunk_activations(job, index).values()) + saved_logits(job, "".join(job.stages[index]))
    return kept


def saved_logits(job: Job, items: str) -> float:
    """What the losses keep: fp32 scores of this rank's part of the vocabulary, labels and a mask; our own loss keeps
    the gradient of the scores instead."""
    if "L" not in items:
        return 0
    own, vocabulary, depths = job.own_loss, job.model.padded_vocab_size, items.count("m")
    kept: Saved = {}
    for i in range(1 + depths):
        kept[f"scores {i}"] = job.element * vocabulary if own else FP32 * vocabulary / job.layout.tp
        kept |= {} if own else {f"labels {i}": INDEX, f"mask {i}": 1}
        kept |= {f"sum {i}": FP32, f"weights {i}": FP32} if i else {}
    return sum(resident(job, {name: job.tokens * size for name, size in kept.items()}).values())


def logits_bytes(job: Job, items: str) -> float:
    """`saved_logits`, and the scores of one loss in the training precision while it is computed."""
    if "L" not in items:
        return 0
    return saved_logits(job, items) + job.element * job.tokens * job.model.padded_vocab_size / job.layout.tp


def _recomputed(job: Job, index: int) -> float:
    """The most that chunk `index` brings back at once: its largest group of layers, less what was kept of it."""
    job = job.of_chunk(index)
    if job.recompute == "none" or not {"t", "m"} & set(job.stages[index]):
        return 0
    first = sum(stage.count("t") for stage in job.stages[:index])
    jobs = [
        job,
        *(job.of_layer(first + i) for i in range(job.stages[index].count("t")) if first + i in job.bf16_layers),
    ]
    kinds = [(one, bool(moe)) for one in jobs for moe in set(job.model.moe_layer_pattern)]
    if job.recompute == "full":
        layers = job.recompute_num_layers if job.recompute_method == "uniform" else 1
        return layers * max(sum(layer(one, moe).values()) for one, moe in kinds)
    return max(sum(layer(one, moe, recompute=False).values()) - sum(layer(one, moe).values()) for one, moe in kinds)


def communication_bytes(job: Job, stage: int, items: Sequence[str], in_flight: int) -> float:
    """Messages between stages that are held, tokens on their way to experts and back, gathered sequences."""
    layout, e = job.layout, job.element
    message = e * job.split_tokens * job.model.hidden_size
    held = 0.0
    if layout.pp > 1:
        whole = "".join(items)
        received = in_flight if "E" not in whole and job.backend == "local" and job.dtype != "fp32" else 0
        sent = in_flight if "L" not in whole and not job.frees_outputs else 0
        held = message * (received + sent + 2)  # and one being received in each direction
    dispatched = 0.0
    if job.model.num_experts and layout.ep * layout.etp > 1:
        dispatched = 2 * e * job.expert_tokens * job.model.hidden_size
    gathered = e * job.tokens * job.model.hidden_size if job.sequence_parallel and layout.tp > 1 else 0
    return held + dispatched + gathered


def peak_in_flight(job: Job, stage: int, sizes: Sequence[float]) -> list[int]:
    """Micro-batches of each chunk that are alive when activations of `sizes` bytes add up to the most."""
    pp, chunks = job.layout.pp, len(sizes)
    if chunks == 1:
        return [min(job.micro_batches, pp - stage)]
    alive, most = [0] * chunks, [0] * chunks
    for chunk, forward in interleaved(pp, chunks, stage, min(job.micro_batches, LONGEST_SIMULATION * pp)):
        alive[chunk] += 1 if forward else -1
        if _bytes(alive, sizes) > _bytes(most, sizes):
            most = list(alive)
    return most


def _bytes(counts: Sequence[int], sizes: Sequence[float]) -> float:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def interleaved(pp: int, chunks: int, stage: int, micro_batches: int) -> Iterator[tuple[int, bool]]:
    """(chunk, whether forward) in the order of one stage's passes (pipeline_parallel/schedules.py upstream).

    Chunks take turns after pp micro-batches each, in the backward passes from the last chunk on.
    """
    total = micro_batches * chunks
    warm_up = min(total, (pp - stage - 1) * 2 + (chunks - 1) * pp)
    for number in range(total + warm_up):
        if number < total:
            yield number % (pp * chunks) // pp, True
        if number >= warm_up:
            yield chunks - 1 - (number - warm_up) % (pp * chunks) // pp, False
