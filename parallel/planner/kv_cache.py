"""The KV cache that fits next to a model at inference. Pure functions; no torch import.

A rank then holds weights without gradients and optimizer state, what a forward pass computes, and its part of the
cache. Data-parallel replicas hold different sequences, context-parallel ranks the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.architecture.kv_cache import bytes_per_token, cache_parts
from parallel.architecture.layers import describe_layer
from parallel.architecture.parts import Model
from parallel.planner.activations import layer
from parallel.planner.memory import Weights, communication_bytes, parameter_bytes
from parallel.planner.saved_tensors import FP32
from parallel.planner.workload import Workload


@dataclass(frozen=True)
class Serving:
    """Sizes of what is generated at the same time.

    Args:
        context_length: tokens of one sequence, prompt and continuation.
        batch_tokens: tokens of one forward pass, over all sequences.
        sequences: sequences whose next token one forward pass computes.
        block_size: tokens of a block of the cache.
        draft_depths: multi-token-prediction layers that draft tokens, each with a cache of its own.
    """

    context_length: int
    batch_tokens: int
    sequences: int
    block_size: int
    draft_depths: int = 0


@dataclass(frozen=True)
class StageRoom:
    """Bytes on one rank of a pipeline stage at inference.

    Args:
        layers: whose keys and values it keeps.
        weights: without gradients and optimizer state.
        forward: what a forward pass computes, at its peak.
        usable: what torch can allocate.
    """

    stage: int
    layers: int
    weights: float
    forward: float
    usable: float

    @property
    def free(self) -> float:
        """What is left for the cache; negative where the model does not fit."""
        return self.usable - self.weights - self.forward

    def blocks(self, layer_bytes: int, block_size: int) -> int | None:
        """Blocks of the cache that fit, for `layer_bytes` of a token in one layer. None where there is no limit."""
        if self.free < 0:
            return 0
        return int(self.free // (self.layers * layer_bytes * block_size)) if self.layers else None


@dataclass(frozen=True)
class CacheFit:
    """One format of the cache.

    Args:
        bytes_per_token: of all decoder layers, without tensor parallelism.
        rank_bytes_per_token: of the rank that limits the number of tokens.
        tokens: that fit on one data-parallel replica, over all sequences.
        sequences: of the context length that fit there.
    """

    cache_format: str
    bytes_per_token: int
    rank_bytes_per_token: int
    tokens: int
    sequences: int


def rooms(workload: Workload, weights: Sequence[Weights], usable_bytes: float, serving: Serving) -> list[StageRoom]:
    """Each pipeline stage, first to last.

    Args:
        workload: of training; its layout and precision count.
        weights: parameters on one rank of each stage.
        usable_bytes: memory of a rank that torch can allocate.
    """
    return [
        StageRoom(
            stage,
            _cached_layers(workload, stage, serving),
            parameter_bytes(workload, of_rank, trains=False),
            forward_bytes(workload, stage, serving),
            usable_bytes,
        )
        for stage, of_rank in enumerate(weights)
    ]


def _cached_layers(workload: Workload, stage: int, serving: Serving) -> int:
    items = _items(workload, stage)
    return items.count("t") + (items.count("m") if serving.draft_depths else 0)


def limiting(found: Sequence[StageRoom]) -> StageRoom:
    """The stage that has the least memory for each of its layers."""
    return min(found, key=lambda room: (room.free >= 0, room.free / room.layers if room.layers else float("inf")))


def fits(
    model: Model, tp: int, found: Sequence[StageRoom], serving: Serving, formats: Sequence[str],
    rotary_format: str | None = None,
) -> list[CacheFit]:  # fmt: skip
    """What fits next to the model in each of `formats` (names of `CACHE_FORMATS`)."""
    size = serving.block_size
    blocks_of_sequence = -(-serving.context_length // size)
    result = []
    for name in formats:
        each = sum(part.bytes_per_token for part in cache_parts(model, name, rotary_format, tp))
        limits = [blocks for room in found if (blocks := room.blocks(each, size)) is not None]
        blocks = min(limits, default=0)
        result.append(
            CacheFit(
                cache_format=name,
                bytes_per_token=bytes_per_token(model, name, rotary_format),
                rank_bytes_per_token=limiting(found).layers * each,
                tokens=blocks * size,
                sequences=blocks // blocks_of_sequence,
            )
        )
    return result


def uncompressed_bytes_per_token(model: Model, element: int) -> int:
    """Bytes of keys and values of all heads of a token, over all layers: what latent attention does not keep."""
    core = describe_layer(model, moe=False).attention.core
    return len(model.moe_layer_pattern) * core.kv_heads * (core.key + core.value) * element


def forward_bytes(workload: Workload, stage: int, serving: Serving) -> float:
    """What a forward pass of `batch_tokens` keeps at its peak: an upper bound, everything that one layer computes.

    Longer sequences than the pass add the keys and values of their earlier tokens, in the precision of the model.
    """
    layout = workload.layout
    multiple = layout.tp if workload.sequence_parallel else 1
    tokens = -(-serving.batch_tokens // multiple) * multiple
    one = replace(
        workload, micro_batch_size=1, seq_length=tokens * layout.cp, recompute="none", recompute_of_chunks=(),
        offload_modules=frozenset(), on_cpu=False,
    )  # fmt: skip
    items = _items(workload, stage)
    hidden = 2 * one.element * one.split_tokens * one.model.hidden_size  # input and output
    return (
        hidden
        + _largest_layer(one, stage, serving)
        + communication_bytes(one, stage, [items], 0)
        + _logits(one, items, serving)
    )


def _items(workload: Workload, stage: int) -> str:
    """Of all chunks of a stage."""
    return "".join("".join(items) for items in workload.stages[stage :: workload.layout.pp])


def _largest_layer(workload: Workload, stage: int, serving: Serving) -> float:
    """What one layer of a stage computes, and the keys and values of earlier tokens of one sequence."""
    model = workload.model
    sizes = [0.0]
    for index in range(stage, len(workload.stages), workload.layout.pp):
        first = sum(items.count("t") for items in workload.stages[:index])
        for number in range(first, first + workload.stages[index].count("t")):
            moe = bool(model.moe_layer_pattern[number])
            core = workload.description(moe).attention.core
            heads = core.kv_heads_on_rank(workload.layout.tp)
            earlier = max(0, serving.context_length - serving.batch_tokens)
            keys_and_values = workload.element * earlier * heads * (core.key + core.value)
            sizes.append(sum(layer(workload.of_layer(number), moe).values()) + keys_and_values)
    return max(sizes)


def _logits(workload: Workload, items: str, serving: Serving) -> float:
    """Scores of a rank and of the whole vocabulary, the latter also in fp32, with fp32 log-probabilities."""
    if "L" not in items:
        return 0.0
    rows = min(serving.sequences * (1 + serving.draft_depths), serving.batch_tokens)
    each = workload.element / workload.layout.tp + workload.element + 2 * FP32
    return rows * workload.model.padded_vocab_size * each
