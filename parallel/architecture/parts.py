"""Parts of the description of a transformer layer. No torch import.

Names are those of a Megatron checkpoint, relative to the layer. `moe_train.conversion` finds the Hugging Face names of
a tensor by its Megatron name, in a table for each model family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Protocol


class Model(Protocol):
    """The fields of an architecture, named as in `moe_train.config.model.ModelConfig`."""

    hidden_size: int
    ffn_hidden_size: int
    attention: str
    num_attention_heads: int
    qk_norm: str
    qkv_bias: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_experts: int
    topk: int
    moe_ffn_hidden_size: int
    num_shared_experts: int
    shared_expert_ffn_hidden_size: int
    shared_expert_gate: bool
    capacity_factor: float | None
    pad_to_capacity: bool
    router_score: str
    router_pre_softmax: bool
    router_topk_groups: int
    router_num_groups: int
    router_group_score: str
    router_bias: bool
    balance_losses: list[str]

    @property
    def kv_heads(self) -> int:
        """Key/value heads of gqa."""
        ...

    @property
    def attention_head_dim(self) -> int:
        """Size of a gqa head."""
        ...

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a gqa head that carry rotary position."""
        ...

    @property
    def shared_expert_width(self) -> int:
        """Inner width of all shared experts together."""
        ...

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def moe_layer_pattern(self) -> list[int]:
        """1 for each MoE layer and 0 for each dense one."""
        ...


class Shard(Enum):
    """How ranks share the weight [out, in] of a linear layer."""

    COLUMN = "rows of the weight are split: each rank computes some of the outputs"
    ROW = "columns of the weight are split: each rank takes some of the inputs, and the outputs are summed"
    REPLICATED = "whole on every rank, each of which computes it for its own tokens"
    LATENT = "whole on every rank in checkpoints and with Transformer Engine; `local` splits the rows"


@dataclass(frozen=True)
class Width:
    """One side of a linear layer: `copies` times the sum of `terms`, or that for each head.

    Args:
        field: field of the model to change for another width.
        terms: parts of the width, or of one head.
        heads: query heads; 0 where the width is not made of heads.
        kv_heads: key/value heads that come in addition, each with a key and a value as wide as a query.
        copies: concatenated equal widths, such as gate and up of SwiGLU.
        meaning: how the width follows from fields, where it is not one field.
    """

    field: str
    terms: tuple[int, ...]
    heads: int = 0
    kv_heads: int = 0
    copies: int = 1
    meaning: str = ""

    @property
    def size(self) -> int:
        """Of the whole layer."""
        units = self.heads + 2 * self.kv_heads if self.heads else 1
        return self.copies * units * sum(self.terms)

    def on_rank(self, ranks: int) -> float:
        """Width on one of `ranks` that split it. A key/value head is on several ranks where there are more of them."""
        each = sum(self.terms)
        if not self.heads:
            return self.copies * (each / ranks)
        shared = 2 * max(1.0, self.kv_heads / ranks) if self.kv_heads else 0.0
        return self.copies * ((self.heads / ranks + shared) * each)

    def arithmetic(self, ranks: int | None) -> str:
        """How one of the `copies` is computed on one of `ranks` (None: not split), for error messages."""
        terms = " + ".join(map(str, self.terms))
        if ranks is None or not self.heads:
            return terms if ranks is None else f"{terms} / {ranks}"
        units = f"{self.heads // ranks}"
        if self.kv_heads:
            units = f"({units} + 2 x {max(1, self.kv_heads // ranks)})"
        return f"{units} x ({terms})" if len(self.terms) > 1 else f"{units} x {terms}"


@dataclass(frozen=True)
class Linear:
    """A linear layer: [tokens, inputs] -> [tokens, outputs].

    Args:
        part: what its parameters count as (`moe_train.model.arithmetic.ParameterCount`).
        name: of its weight in a checkpoint.
        source: the tensor that it reads and keeps for its backward pass. Layers with the same source share it.
        experts: number of experts that have one each; 0 for a layer that is not an expert's. Experts are spread over ep
            ranks, and sharded over etp instead of tp.
        quantised: whether it computes in FP8 where a recipe is on.
        bias: name of its bias in a checkpoint; empty where it has none.
        recomputed_by: values of `recompute.modules` that compute it again in the backward pass.
    """

    part: str
    name: str
    outputs: Width
    inputs: Width
    shard: Shard
    source: str
    experts: int = 0
    quantised: bool = True
    bias: str = ""
    recomputed_by: tuple[str, ...] = ()

    @property
    def degree(self) -> str:
        """The degree of parallelism that splits it."""
        return "etp" if self.experts else "tp"

    def outputs_on_rank(self, ranks: int) -> float:
        """Outputs on one of `ranks` tensor-parallel ranks."""
        return self.outputs.on_rank(ranks if self.shard is Shard.COLUMN else 1)

    def inputs_on_rank(self, ranks: int) -> float:
        """Inputs on one of `ranks` tensor-parallel ranks."""
        return self.inputs.on_rank(ranks if self.shard is Shard.ROW else 1)

    def tensors(self) -> Iterator[Tensor]:
        """Its weight, and its bias."""
        divided = "expert" if self.experts else "tp" if self.shard in (Shard.COLUMN, Shard.ROW) else ""
        shape = (self.outputs.size, self.inputs.size)
        yield Tensor(self.name, self.part, shape, self.experts or 1, divided, self.quantised)
        if self.bias:
            yield Tensor(self.bias, self.part, (self.outputs.size,), divided=divided)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `width`.

    Args:
        name: of its weight in a checkpoint, that of Transformer Engine's modules, which fuse it into the linear layer
            behind it where there is one alone.
        local: name in modules that keep it apart, where that is another one.
    """

    name: str
    width: int
    local: str = ""

    def tensors(self) -> Iterator[Tensor]:
        """Its weight."""
        yield Tensor(self.name, "norms", (self.width,))


@dataclass(frozen=True)
class Tensor:
    """`copies` tensors of one shape, `[out, in]` or `[size]`.

    Args:
        name: in a checkpoint.
        part: what its parameters count as.
        copies: one for each expert, of which `shape` is one.
        divided: over tp, over expert (ep x etp) ranks; empty where every rank holds it whole.
        quantised: a matrix that multiplies in FP8 where a recipe is on.
        trained: whether an optimizer trains it; expert selection biases follow a rule of their own.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    copies: int = 1
    divided: str = ""
    quantised: bool = False
    trained: bool = True

    @property
    def numel(self) -> int:
        """Elements of all copies."""
        return prod(self.shape) * self.copies


def hidden_width(model: Model) -> Width:
    """The residual stream."""
    return Width("hidden_size", (model.hidden_size,))
