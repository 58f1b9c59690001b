"""Memory of one rank of each pipeline stage, from the configuration alone. Pure functions; no torch import.

What is counted is what torch allocates: neither the CUDA context nor NCCL's own buffers, nor fragmentation.
Experts are taken to get equally many tokens; a rank whose experts get x % more has x % more of `expert_share`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.architecture.attention import attention_kind
from parallel.fp8_recipes import RECIPES
from parallel.planner.activations import EXPERT_TENSORS, layer, resident, shared_embedding_bytes
from parallel.planner.saved_tensors import FP32, INDEX, Saved, linear_input, norm
from parallel.planner.workload import TORCH_LOSS_BYTES, Workload

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
        recompute: activations that one layer, or group of layers, recomputes while its backward pass runs.
        communication: buffers of send/recv between stages, dispatched tokens, gathered sequences.
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


def stage_memory(workload: Workload, stage: int, weights: Weights) -> StageMemory:
    """Memory of one rank of pipeline stage `stage`, which holds `weights`."""
    pp = workload.layout.pp
    chunks = [chunk_activations(workload, i) for i in range(stage, len(workload.stages), pp)]
    in_flight = peak_in_flight(workload, stage, [sum(chunk.values()) for chunk in chunks])
    activations = sum(count * sum(chunk.values()) for count, chunk in zip(in_flight, chunks, strict=True))
    items = tuple("".join(workload.stages[i]) for i in range(stage, len(workload.stages), pp))
    routed = [size for chunk in chunks for name, size in chunk.items() if EXPERT_TENSORS in name]
    return StageMemory(
        stage=stage,
        items=items,
        parameters=round(parameter_bytes(workload, weights)),
        gradients=round(gradient_bytes(workload, weights)),
        optimizer=round(optimizer_bytes(workload, weights)),
        micro_batches_in_flight=sum(in_flight),
        activations_per_micro_batch=round(sum(sum(chunk.values()) for chunk in chunks)),
        expert_share=round(sum(routed)),
        activations=round(activations),
        recompute=round(max(_recomputed(workload, i) for i in range(stage, len(workload.stages), pp))),
        communication=round(communication_bytes(workload, stage, items, sum(in_flight))),
        logits=round(logits_bytes(workload, "".join(items))),
    )


def memory_of_ranks(workload: Workload, schedule: str, memory: Sequence[StageMemory]) -> list[float]:
    """Memory of each pipeline rank under a schedule, bytes, from that of its stage under 1F1B or interleaved.

    A rank of DualPipe holds two stages, `rank` and its mirror image, the optimizer state of each shared with the rank
    that holds the same two, and PP + 1 activations in all. DualPipeV keeps 2 PP + 1 activations of its half stages.
    """
    pp = workload.layout.pp
    if schedule == "dualpipev":
        alive = min(pp + 0.5, workload.micro_batches)
        return [
            stage_memory.total - stage_memory.activations + alive * stage_memory.activations_per_micro_batch
            for stage_memory in memory
        ]
    if schedule != "dualpipe":
        return [float(stage_memory.total) for stage_memory in memory]
    sizes: list[float] = []
    for rank, stage_memory in enumerate(memory):
        other = memory[pp - 1 - rank]
        static = float(stage_memory.parameters + stage_memory.gradients + other.parameters + other.gradients)
        static += (stage_memory.optimizer + other.optimizer) / 2
        if rank in (0, pp - 1):
            static -= shared_embedding_bytes(workload)
        alive = (pp - rank) * stage_memory.activations_per_micro_batch + (rank + 1) * other.activations_per_micro_batch
        transient = max(stage_memory.recompute, other.recompute) + max(stage_memory.communication, other.communication)
        sizes.append(static + alive + transient + stage_memory.logits + other.logits)
    return sizes


def parameter_bytes(workload: Workload, weights: Weights, *, trains: bool = True) -> float:
    """Weights; in FP8 also the copies that layers cache: for the GEMM of the forward pass, and with `trains` for the
    one with their transpose.

    Under FSDP, which only trains: an fp32 shard, and what is gathered at once.
    """
    if workload.fsdp and trains:
        return 4 * _shard(workload, weights) + workload.element * _gathered(workload, weights)
    whole = workload.element * (weights.shared + weights.experts)
    if workload.fp8 is None:
        return whole
    copies = (2 if trains else 1) * RECIPES[workload.fp8].element_bytes * weights.in_fp8
    return copies + whole - (workload.element * weights.in_fp8 if workload.fp8_weights_only else 0)


def gradient_bytes(workload: Workload, weights: Weights) -> float:
    """Gradients; under FSDP an fp32 shard, and those of the layers whose weights are gathered. None where weights are
    frozen."""
    if workload.frozen:
        return 0.0
    if workload.fsdp:
        return 4 * _shard(workload, weights) + 4 * _gathered(workload, weights)
    return workload.grad_bytes * (weights.shared + weights.experts)


def _shard(workload: Workload, weights: Weights) -> float:
    """Parameters that one rank keeps under FSDP."""
    layout = workload.layout
    return weights.shared / (layout.dp * layout.cp) + weights.experts / layout.edp


def _gathered(workload: Workload, weights: Weights) -> float:
    """Parameters that FSDP has gathered at once: two layers, or with a pipeline the whole stage between its
    micro-batches."""
    pp = workload.layout.pp
    layers = max(1, len(workload.model.moe_layer_pattern) // pp)
    return (weights.shared + weights.experts) * (1.0 if pp > 1 else min(1.0, 2 / layers))


def optimizer_bytes(workload: Workload, weights: Weights) -> float:
    """Adam's moments and, for 16-bit weights, the fp32 main weights; a mean over the ranks that share them. None where
    weights are frozen."""
    if workload.frozen:
        return 0.0
    each = 2 * workload.moment_bytes + (0 if workload.dtype == "fp32" else FP32)
    if not workload.distributed_optimizer:
        return each * (weights.shared + weights.experts)
    replicas = workload.layout.dp * workload.layout.cp
    return each * (weights.shared / replicas + weights.experts / workload.layout.edp)


def chunk_activations(workload: Workload, index: int) -> Saved:
    """What the forward pass of one micro-batch through chunk `index` keeps, without what its loss keeps."""
    workload, items = workload.of_chunk(index), workload.stages[index]
    first = sum(stage.count("t") for stage in workload.stages[:index])
    pattern = workload.model.moe_layer_pattern[first : first + items.count("t")]
    r, hidden, last = workload.split_tokens, workload.model.hidden_size, first + len(pattern)
    saved = _embedding(workload, "embedding") if "E" in items else {}
    saved |= _layers(workload, first, [bool(moe) for moe in pattern])
    depths = items.count("m")
    has_mtp = any("m" in stage for stage in workload.stages)
    if (first < last == len(workload.model.moe_layer_pattern)) if has_mtp else "L" in items:
        saved |= norm(workload, "final norm", r, hidden, "final norm input")
    for depth in range(depths):
        saved |= {f"mtp {depth} {name}": size for name, size in _mtp(workload).items()}
    if "L" in items:
        outputs = 1 + depths  # one tensor for all of them
        saved["output head input"] = workload.element * r * hidden * outputs
    return resident(workload, saved)


def _embedding(workload: Workload, name: str) -> Saved:
    mask = {f"{name}: mask": workload.tokens} if workload.layout.tp > 1 else {}
    return {f"{name}: token ids": INDEX * workload.tokens, **mask}


def _layers(workload: Workload, first: int, moe: Sequence[bool]) -> Saved:
    """All layers of a chunk from number `first` on, with whole ones or groups of them recomputed in `full` mode."""
    r, hidden, size = workload.split_tokens, workload.model.hidden_size, workload.recompute_num_layers
    saved: Saved = {}
    if (
        moe and workload.recompute == "full" and attention_kind(workload.model).shared_rope
    ):  # one tensor that every checkpoint keeps
        saved["rotary angles"] = FP32 * (workload.seq_length // workload.layout.cp) * workload.model.rotary_dim
    for number, is_moe in enumerate(moe):
        if workload.recompute == "full" and (workload.recompute_method == "uniform" or number < size):
            if workload.recompute_method == "block" or number % size == 0:
                saved[f"layer {number} input"] = workload.element * r * hidden
            continue
        saved |= {
            f"layer {number} {name}": value for name, value in layer(workload.of_layer(first + number), is_moe).items()
        }
    return saved


def _mtp(workload: Workload) -> Saved:
    """One multi-token-prediction depth (transformer/multi_token_prediction.py upstream)."""
    r, hidden, e = workload.split_tokens, workload.model.hidden_size, workload.element
    saved = _embedding(workload, "embedding")
    if workload.recompute == "full" and workload.recompute_method == "uniform":
        return saved | {"hidden states": e * r * hidden, "next embedding": e * r * hidden}
    saved |= norm(workload, "embedding norm", r, hidden, "next embedding")
    saved |= norm(workload, "hidden norm", r, hidden, "hidden states")
    saved |= linear_input(workload, "projection input", r, 2 * hidden)
    inside = layer(workload, bool(workload.model.moe_layer_pattern[-1]))
    if "input" in inside:  # a slice of the gathered projection, which it keeps alive
        inside["input"] = e * workload.tokens * hidden
    saved |= inside
    return saved | norm(workload, "final norm", r, hidden, "final norm input")


def saved_per_micro_batch(workload: Workload, stage: int) -> float:
    """Bytes that one forward pass through all chunks of a rank keeps for its backward pass, logits included."""
    saved = 0.0
    for index in range(stage, len(workload.stages), workload.layout.pp):
        saved += sum(chunk_activations(workload, index).values()) + saved_logits(
            workload, "".join(workload.stages[index])
        )
    return saved


def saved_logits(workload: Workload, items: str) -> float:
    """What the losses keep: fp32 scores of this rank's part of the vocabulary, labels and a mask; our own loss keeps
    the gradient of the scores instead."""
    if "L" not in items:
        return 0
    own, vocabulary, depths = workload.own_loss, workload.model.padded_vocab_size, items.count("m")
    saved: Saved = {}
    for i in range(1 + depths):
        saved[f"scores {i}"] = workload.element * vocabulary if own else FP32 * vocabulary / workload.layout.tp
        saved |= {} if own else {f"labels {i}": INDEX, f"mask {i}": 1}
        saved |= {f"sum {i}": FP32, f"weights {i}": FP32} if i else {}
    return sum(resident(workload, {name: workload.tokens * size for name, size in saved.items()}).values())


def logits_bytes(workload: Workload, items: str) -> float:
    """`saved_logits`, and the scores of one loss in the training precision while it is computed."""
    if "L" not in items:
        return 0
    if workload.loss in TORCH_LOSS_BYTES:
        each = TORCH_LOSS_BYTES[workload.loss]
        return each * workload.tokens * workload.model.padded_vocab_size / workload.layout.tp
    return (
        saved_logits(workload, items)
        + workload.element * workload.tokens * workload.model.padded_vocab_size / workload.layout.tp
    )


def _recomputed(workload: Workload, index: int) -> float:
    """The most that chunk `index` recomputes at once: its largest group of layers, less what was saved of it."""
    workload = workload.of_chunk(index)
    if workload.recompute == "none" or not {"t", "m"} & set(workload.stages[index]):
        return 0
    first = sum(stage.count("t") for stage in workload.stages[:index])
    workloads = [
        workload,
        *(
            workload.of_layer(first + i)
            for i in range(workload.stages[index].count("t"))
            if first + i in workload.bf16_layers
        ),
    ]
    kinds = [(kind_workload, bool(moe)) for kind_workload in workloads for moe in set(workload.model.moe_layer_pattern)]
    if workload.recompute == "full":
        layers = workload.recompute_num_layers if workload.recompute_method == "uniform" else 1
        return layers * max(sum(layer(kind_workload, moe).values()) for kind_workload, moe in kinds)
    return max(
        sum(layer(kind_workload, moe, recompute=False).values()) - sum(layer(kind_workload, moe).values())
        for kind_workload, moe in kinds
    )


def communication_bytes(workload: Workload, stage: int, items: Sequence[str], in_flight: int) -> float:
    """Buffers of send/recv between stages, of dispatched and combined tokens, and of gathered sequences."""
    layout, e = workload.layout, workload.element
    message = e * workload.split_tokens * workload.model.hidden_size
    buffers = 0.0
    if layout.pp > 1:
        whole = "".join(items)
        received = in_flight if "E" not in whole and workload.backend == "local" and workload.dtype != "fp32" else 0
        sent = in_flight if "L" not in whole and not workload.frees_outputs else 0
        buffers = message * (received + sent + 2)  # and one being received in each direction
    dispatched = 0.0
    if workload.model.num_experts and layout.ep * layout.etp > 1:
        dispatched = 2 * e * workload.expert_tokens * workload.model.hidden_size
    gathered = e * workload.tokens * workload.model.hidden_size if workload.sequence_parallel and layout.tp > 1 else 0
    return buffers + dispatched + gathered


def peak_in_flight(workload: Workload, stage: int, sizes: Sequence[float]) -> list[int]:
    """Micro-batches of each chunk that are alive when activations of `sizes` bytes add up to the most."""
    pp, chunks = workload.layout.pp, len(sizes)
    if chunks == 1:
        return [min(workload.micro_batches, pp - stage)]
    alive, most = [0] * chunks, [0] * chunks
    for chunk, forward in interleaved(pp, chunks, stage, min(workload.micro_batches, LONGEST_SIMULATION * pp)):
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
