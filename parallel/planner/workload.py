"""What the analytic models need to know of a run, without its config classes. No torch import."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from parallel.architecture.layers import Layer, describe_layer
from parallel.architecture.parts import Model
from parallel.layout import ParallelLayout

# Up to here the `local` backend keeps attention's probabilities on a CPU, tokens: faster there, but they grow with the
# square of the length.
SHORT_TOKENS = 512


def query_block(element: int) -> int:
    """Queries that short attention takes at once, from the bytes of an element: smaller blocks skip more of the scores
    above the diagonal, larger ones make faster GEMMs (measured: 64 in fp32, 128 in bf16)."""
    return 64 if element == 4 else 128


def short_attention_scores(tokens: int, element: int) -> int:
    """Scores that short attention computes and keeps for a head and a sequence of `tokens`."""
    block = query_block(element)
    ends = (min(start + block, tokens) for start in range(0, tokens, block))
    return sum((end - start) * end for start, end in zip(range(0, tokens, block), ends, strict=True))


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Cross entropy of Megatron-Core, and that of torch with which torchtitan trains.
LOSSES = ("megatron", "torch", "torch_compiled")
# Bytes that torch's cross entropy holds of one score in its backward pass. Eager: log-probabilities, their gradient
# and that of the scores, each fp32 (aten's nll_loss_backward and log_softmax_backward). Compiled into one kernel:
# scores and their gradient in fp32, and the latter in 16 bits.
TORCH_LOSS_BYTES = {"torch": 12, "torch_compiled": 10}
# none, full or selective, and the modules of the last.
Recompute = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class Workload:
    """What one step computes and keeps, as far as the models look at it.

    Args:
        stages: items of each of the pp x vpp pipeline chunks (`parallel.pipeline.stage_items`).
        micro_batches: forward passes of one rank in one step.
        backend: te or local.
        fused: whether the activation function is one kernel that keeps only its input.
        grouped: whether the experts of a rank are one grouped GEMM, with a fused activation function.
        dtype: fp32, bf16 or fp16, of weights and activations.
        fp8: block, tensor, delayed, mxfp8 or nvfp4, where linear layers compute and keep their inputs in FP8 or FP4;
            else None.
        bf16_layers: decoder layers (from 0) that compute in 16 bits, in spite of FP8 or FP4.
        fp8_weights_only: weights of linear layers exist in FP8 alone, next to the optimizer's fp32 main weights.
        compact: activations are kept as in DeepSeek-V3 (`parallel.planner.activations.compacted`).
        grad_bytes, moment_bytes: of one gradient, and of one of the two Adam moments.
        distributed_optimizer: optimizer state is divided over data-parallel ranks.
        fsdp: weights and gradients are sharded over data-parallel ranks too, and gathered layer by layer (ZeRO-3).
        frozen: weights have no gradient and no optimizer state (LoRA, without its adapters).
        loss: cross entropy whose memory is counted, one of `LOSSES`.
        recompute: none, full or selective, with what it applies to.
        recompute_of_chunks: mode and modules of each of the pp stages, or pp x vpp chunks, instead of `recompute`.
        offload_modules: on te, modules whose inputs wait for the backward pass outside.
        offload_min_bytes: on local, tensors of so many bytes and more wait outside.
        frees_outputs: a pipeline stage frees what it has sent.
        on_cpu: the `local` backend takes its own attention for short sequences, and its own loss.
    """

    model: Model
    layout: ParallelLayout
    stages: list[list[str]]
    micro_batch_size: int
    seq_length: int
    micro_batches: int
    sequence_parallel: bool
    backend: str
    fused: bool
    grouped: bool
    dtype: str
    fp8: str | None = None
    bf16_layers: frozenset[int] = frozenset()
    fp8_weights_only: bool = False
    compact: bool = False
    grad_bytes: int = 4
    moment_bytes: int = 4
    distributed_optimizer: bool = True
    fsdp: bool = False
    frozen: bool = False
    loss: str = "megatron"
    recompute: str = "none"
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    recompute_modules: frozenset[str] = frozenset()
    recompute_of_chunks: tuple[Recompute, ...] = ()
    offload_modules: frozenset[str] = frozenset()
    offload_min_bytes: float = math.inf
    frees_outputs: bool = True
    on_cpu: bool = False

    def of_chunk(self, index: int) -> Workload:
        """The workload of chunk `index` of the pp x vpp, with what that chunk recomputes."""
        if not self.recompute_of_chunks:
            return self
        mode, modules = self.recompute_of_chunks[index % len(self.recompute_of_chunks)]
        return replace(self, recompute=mode, recompute_modules=modules, recompute_of_chunks=())

    def of_layer(self, number: int) -> Workload:
        """The workload of decoder layer `number`: without FP8 where the layer stays in bf16."""
        return replace(self, fp8=None) if self.fp8 and number in self.bf16_layers else self

    def description(self, moe: bool) -> Layer:
        """A layer with routed experts, or with a dense feed-forward."""
        return describe_layer(self.model, moe)

    @property
    def recomputes(self) -> str:
        """What is recomputed, in one word; different chunks are divided by bars."""
        each = self.recompute_of_chunks or ((self.recompute, self.recompute_modules),)
        return "|".join("+".join(sorted(modules)) or mode for mode, modules in each)

    @property
    def own_loss(self) -> bool:
        """Whether the loss keeps the gradient of its scores (moe_train.model.local.loss)."""
        return self.on_cpu and self.backend == "local" and self.layout.tp == 1

    @property
    def short_attention(self) -> bool:
        """Whether attention keeps its probabilities (moe_train.model.local.attention)."""
        short = self.seq_length <= SHORT_TOKENS and self.layout.cp == 1
        return self.on_cpu and self.backend == "local" and short

    @property
    def element(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank that holds its whole part of the sequence."""
        return self.micro_batch_size * self.seq_length // self.layout.cp

    @property
    def split_tokens(self) -> int:
        """The same where sequence parallelism divides them over tensor-parallel ranks."""
        return self.tokens // self.layout.tp if self.sequence_parallel else self.tokens

    @property
    def expert_tokens(self) -> float:
        """Tokens that the experts of one rank get, counted once for each expert visited, when all get equally many."""
        visits = self.split_tokens * self.model.topk * self.layout.etp
        capacity = self.model.capacity_factor
        if capacity is None:
            return visits
        return visits * (capacity if self.model.pad_to_capacity else min(1.0, capacity))
