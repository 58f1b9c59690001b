"""Parameters and FLOPs of a model, counted from its configuration alone. Pure functions; nothing here imports torch.

Every figure is a sum over one list: the tensors of a layer with their shapes (`parallel.architecture.layers`). A matrix
counts with its stored shape, and the vocabulary with its padding to 128 rows, which no released model here needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moe_train.config.model import ModelConfig
from parallel.architecture.attention import attention_kind
from parallel.architecture.layers import describe_layer, embedding, final_norm, mtp_tensors, output_head
from parallel.architecture.parts import Tensor

LAYER_PARTS = ("attention", "dense_ffn", "routed_experts", "shared_experts", "router")
MAIN_PARTS = ("embedding", "output_head", *LAYER_PARTS, "norms")
BACKWARD_OVER_FORWARD = 2  # each matmul has two of the same size in the backward pass: input gradient, weight gradient


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters of a model by part, and the selection-bias entries, which no optimizer trains.

    The parts up to `norms` are the main model. `mtp` is everything that multi-token prediction adds: its embedding and
    output head are the main model's.
    """

    embedding: int = 0
    output_head: int = 0
    attention: int = 0
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    mtp: int = 0
    idle: int = 0  # routed experts that a given token does not visit, main model
    mtp_idle: int = 0
    expert_bias: int = 0
    mtp_expert_bias: int = 0

    def by_part(self, include_mtp: bool = False) -> dict[str, int]:
        """Part -> parameters; the values sum to the total."""
        names = (*MAIN_PARTS, "mtp") if include_mtp else MAIN_PARTS
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Parameters of the main model, without multi-token prediction."""
        return sum(self.by_part().values())

    @property
    def total_with_mtp(self) -> int:
        """Parameters of the main model and multi-token prediction."""
        return self.total + self.mtp

    @property
    def active(self) -> int:
        """Parameters of the main model that serve one token: all but the routed experts that it does not visit.

        The embedding counts whole, as in published figures (37B of DeepSeek-V3, 12.9B of Mixtral 8x7B).
        """
        return self.total - self.idle

    @property
    def active_with_mtp(self) -> int:
        """`active` and the same for multi-token prediction."""
        return self.active + self.mtp - self.mtp_idle


@dataclass(frozen=True)
class RankParameters:
    """What one rank holds: weights outside experts, weights of its routed experts, selection-bias entries.

    `linear` are those weights of both kinds that multiply in FP8 where a recipe says so: matrices of layers, without
    router and gates.
    """

    shared: int
    experts: int
    expert_bias: int
    linear: int

    @property
    def total(self) -> int:
        """Trainable parameters on the rank."""
        return self.shared + self.experts

    def __add__(self, other: RankParameters) -> RankParameters:
        return RankParameters(
            self.shared + other.shared,
            self.experts + other.experts,
            self.expert_bias + other.expert_bias,
            self.linear + other.linear,
        )

    def __mul__(self, count: int) -> RankParameters:
        return RankParameters(count * self.shared, count * self.experts, count * self.expert_bias, count * self.linear)


def _layer_tensors(model: ModelConfig, moe: bool) -> list[Tensor]:
    """Trained tensors of one transformer layer."""
    return [tensor for tensor in describe_layer(model, moe).tensors if tensor.trained]


def _mtp_tensors(model: ModelConfig) -> list[Tensor]:
    """Trained tensors of one multi-token-prediction depth, whose layer is like the model's last."""
    return [*mtp_tensors(model), *_layer_tensors(model, moe=bool(model.moe_layer_pattern[-1]))]


def _decoder_tensors(model: ModelConfig) -> list[Tensor]:
    """Trained tensors of all transformer layers of the main model."""
    pattern = model.moe_layer_pattern
    kinds = ((False, pattern.count(0)), (True, pattern.count(1)))
    return [replace(one, copies=one.copies * n) for moe, n in kinds if n for one in _layer_tensors(model, moe)]


def _total(tensors: Iterable[Tensor], part: str | None = None) -> int:
    return sum(one.numel for one in tensors if part is None or one.part == part)


def _idle(model: ModelConfig, tensors: Iterable[Tensor]) -> int:
    """Elements of the routed experts that one token does not visit."""
    routed = _total(tensors, "routed_experts")
    return routed - routed // model.num_experts * model.topk if routed else 0


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model by part, with what multi-token prediction adds held apart."""
    decoder = _decoder_tensors(model)
    mtp = _mtp_tensors(model) * model.mtp_num_layers
    pattern = model.moe_layer_pattern
    biases = model.num_experts if model.router_bias else 0
    return ParameterCount(
        embedding=embedding(model).numel,
        output_head=0 if model.tie_embeddings else output_head(model).numel,
        norms=_total(decoder, "norms") + final_norm(model).numel,
        mtp=_total(mtp),
        idle=_idle(model, decoder),
        mtp_idle=_idle(model, mtp),
        expert_bias=biases * sum(pattern),
        mtp_expert_bias=biases * pattern[-1] * model.mtp_num_layers,
        **{part: _total(decoder, part) for part in LAYER_PARTS},
    )


def forward_flops_per_token(
    model: ModelConfig, seq_length: int, causal: bool = True, include_mtp: bool = False
) -> float:
    """FLOPs of one token's forward pass; `flops_per_token` defines what is counted."""
    linear = [*_decoder_tensors(model), output_head(model)]
    layers = model.num_layers
    if include_mtp:
        linear += [*_mtp_tensors(model), output_head(model)] * model.mtp_num_layers
        layers += model.mtp_num_layers
    matrices = [one for one in linear if len(one.shape) == 2]
    attended = seq_length / 2 if causal else seq_length
    core = attention_kind(model).describe(model).core
    scores_and_values = 2 * attended * core.heads * (core.key + core.value) * layers
    return 2 * (_total(matrices) - _idle(model, matrices)) + scores_and_values


def flops_per_token(model: ModelConfig, seq_length: int, causal: bool = True, include_mtp: bool = False) -> float:
    """Training FLOPs of one token in a sequence of `seq_length` tokens: forward and backward, no recomputation.

    Counted, a matmul [m, k] x [k, n] as 2mnk and its backward as twice that: every linear layer (attention projections,
    router, dense feed-forward, `topk` routed and the shared experts, output head) and attention's scores and values.
    With `causal` a token attends to seq_length / 2 others on average, without it to seq_length: the two conventions of
    published MFU. `include_mtp` adds each depth's projection, layer and use of the output head.

    Not counted: embedding look-up, norms, activations, softmax, rotary embedding, top-k, optimizer, capacity padding.

    DeepSeek-V3 at 4,096 tokens comes to 0.2504 TFLOP causal and 0.2812 not, 0.2606 causal with MTP. Its published
    throughput and MFU imply 0.2498 and 0.2805 (arXiv 2505.09343, table 4), 0.3 % less.
    """
    return (1 + BACKWARD_OVER_FORWARD) * forward_flops_per_token(model, seq_length, causal, include_mtp)


def single_stage(model: ModelConfig) -> list[list[str]]:
    """Stages of a model without a pipeline, in Megatron-Core's letters: embedding, layers, MTP depths, loss."""
    return [["E", *["t"] * model.num_layers, *["m"] * model.mtp_num_layers, "L"]]


def parameters_of_ranks(
    model: ModelConfig,
    stages: Sequence[Sequence[str]],
    *,
    pp: int = 1,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    bf16_layers: Collection[int] = (),
) -> list[RankParameters]:
    """Parameters that Megatron-Core puts on a rank of the first pipeline rank, the second, and so on.

    Ranks of the same pipeline rank hold equally many.

    Args:
        stages: letters of each stage in the order that tokens pass them, pp x vpp lists of "E" (embedding), "t"
            (layer), "m" (MTP depth), "L" (loss, with the output head). Chunk v of rank p is stages[v * pp + p].
        bf16_layers: layers (from 0) whose weights are not among the `linear` ones.

    Raises:
        ValueError: a weight does not divide over the ranks. Validation of the layout catches it first.
    """
    counts, pattern = _RankCounts(model, tp, ep, etp), model.moe_layer_pattern
    ranks = [RankParameters(0, 0, 0, 0)] * pp
    passed = 0  # layers of earlier stages
    for index, items in enumerate(stages):
        layers = list(items).count("t")
        ranks[index % pp] += counts.chunk(items, passed)
        in_bf16 = [counts.layer(bool(pattern[i])).linear for i in range(passed, passed + layers) if i in bf16_layers]
        ranks[index % pp] += RankParameters(0, 0, 0, -sum(in_bf16))
        passed += layers
    return ranks


class _RankCounts:
    """What one rank holds of a model's layers, counted once for many of them."""

    def __init__(self, model: ModelConfig, tp: int, ep: int, etp: int) -> None:
        self._model, self._parts = model, {"": 1, "tp": tp, "expert": ep * etp}
        self._layers: dict[bool, RankParameters] = {}

    def layer(self, moe: bool) -> RankParameters:
        """Of one transformer layer."""
        if moe not in self._layers:
            self._layers[moe] = self._count(_layer_tensors(self._model, moe))
        return self._layers[moe]

    @cached_property
    def mtp(self) -> RankParameters:
        """Of one multi-token-prediction depth."""
        return self._count(_mtp_tensors(self._model))

    @cached_property
    def embedding(self) -> RankParameters:
        """Of the embedding."""
        return self._count([embedding(self._model)])

    def chunk(self, items: Sequence[str], first_layer: int) -> RankParameters:
        """Of one pipeline chunk, with the copies that it needs (GPTModel.__init__ upstream)."""
        model, depths = self._model, list(items).count("m")
        last_layer = first_layer + list(items).count("t")
        pattern = model.moe_layer_pattern[first_layer:last_layer]
        held = [self.layer(bool(moe)) * pattern.count(moe) for moe in sorted(set(pattern))]
        held += [self.mtp * depths] if depths else []
        # MTP embeds the next tokens: a copy of the embedding on its stage.
        held += [self.embedding] if "E" in items or depths else []
        # With MTP the final norm is behind the last layer, without it on the last stage.
        has_final_norm = first_layer < last_layer == model.num_layers if model.mtp_num_layers else "L" in items
        if has_final_norm:
            held.append(self._count([final_norm(model)]))
        if "L" in items and not (model.tie_embeddings and "E" in items):
            held.append(self._count([output_head(model)]))
        return sum(held, start=RankParameters(0, 0, 0, 0))

    def _count(self, tensors: Iterable[Tensor]) -> RankParameters:
        shared = experts = expert_bias = linear = 0
        for tensor in tensors:
            size = self._numel(tensor)
            experts += size if tensor.divided == "expert" else 0
            shared += size if tensor.divided != "expert" else 0
            linear += size if tensor.quantised else 0
            if self._model.router_bias and tensor.part == "router":  # every rank keeps the bias of all experts
                expert_bias += tensor.shape[0] * tensor.copies
        return RankParameters(shared, experts, expert_bias, linear)

    def _numel(self, tensor: Tensor) -> int:
        """Elements of `tensor` on one rank."""
        parts = self._parts[tensor.divided]
        if tensor.numel % parts:
            raise ValueError(f"{tensor.copies} x {tensor.shape} of {tensor.part} does not divide over {parts} ranks")
        return tensor.numel // parts
