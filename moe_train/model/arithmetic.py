"""Parameters and FLOPs of a model, counted from its configuration alone. Pure functions; nothing here imports torch.

Every figure is a sum over one list: the weights of a layer with their shapes (`layer_weights`, `mtp_weights`). A matrix
counts as it is stored, and the vocabulary with its padding to 128 rows, which no released model here needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from moe_train.config.model import ModelConfig

LAYER_PARTS = ("attention", "dense_ffn", "routed_experts", "shared_experts", "router")
MAIN_PARTS = ("embedding", "output_head", *LAYER_PARTS, "norms")
BACKWARD_OVER_FORWARD = 2  # each matmul has two of the same size in the backward pass: input gradient, weight gradient


@dataclass(frozen=True)
class Weight:
    """`copies` weights of one shape, each `[out, in]` or `[size]`."""

    part: str  # field of ParameterCount that it belongs to
    shape: tuple[int, ...]
    copies: int = 1
    split: str = "none"  # over tp; expert (ep x etp); none (whole on every rank)

    @property
    def numel(self) -> int:
        """Elements of all copies."""
        return prod(self.shape) * self.copies

    @property
    def multiplies_in_fp8(self) -> bool:
        """Whether a layer's matrix does so where a recipe is on; a router and the gate of shared experts do not."""
        return len(self.shape) == 2 and self.part != "router" and self.shape[0] > 1


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


def layer_weights(model: ModelConfig, moe: bool) -> list[Weight]:
    """Weights of one transformer layer, with routed experts or with a dense feed-forward."""
    hidden = model.hidden_size
    weights = [Weight("norms", (hidden,), copies=2)]
    weights += _mla_weights(model) if model.attention == "mla" else _gqa_weights(model)
    if not moe:
        return weights + _swiglu("dense_ffn", hidden, model.ffn_hidden_size)
    weights.append(Weight("router", (model.num_experts, hidden)))
    weights += _swiglu("routed_experts", hidden, model.moe_ffn_hidden_size, model.num_experts, "expert")
    if model.num_shared_experts:
        # Upstream makes one wide expert of all shared ones: the same number of parameters.
        weights += _swiglu("shared_experts", hidden, model.shared_expert_width)
    if model.shared_expert_gate:
        weights.append(Weight("shared_experts", (1, hidden)))
    return weights


def _mla_weights(model: ModelConfig) -> list[Weight]:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1 and appendix C)."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    qk = model.qk_nope_head_dim + model.qk_rope_head_dim
    kv_latent = model.kv_lora_rank
    weights = [
        Weight("attention", (kv_latent + model.qk_rope_head_dim, hidden)),
        Weight("norms", (kv_latent,)),
        Weight("attention", (heads * (model.qk_nope_head_dim + model.v_head_dim), kv_latent), split="tp"),
        Weight("attention", (hidden, heads * model.v_head_dim), split="tp"),
    ]
    if not model.q_lora_rank:
        return [*weights, Weight("attention", (heads * qk, hidden), split="tp")]
    return [
        *weights,
        Weight("attention", (model.q_lora_rank, hidden)),
        Weight("norms", (model.q_lora_rank,)),
        Weight("attention", (heads * qk, model.q_lora_rank), split="tp"),
    ]


def _gqa_weights(model: ModelConfig) -> list[Weight]:
    heads, groups, size, hidden = model.num_attention_heads, model.kv_heads, model.attention_head_dim, model.hidden_size
    weights = [
        Weight("attention", ((heads + 2 * groups) * size, hidden), split="tp"),
        Weight("attention", (hidden, heads * size), split="tp"),
    ]
    if model.qkv_bias:
        weights.append(Weight("attention", ((heads + 2 * groups) * size,), split="tp"))
    if model.qk_norm == "head":
        weights.append(Weight("norms", (size,), copies=2))
    elif model.qk_norm == "full":
        weights += [Weight("norms", (heads * size,)), Weight("norms", (groups * size,))]
    return weights


def _swiglu(part: str, hidden: int, inner: int, copies: int = 1, split: str = "tp") -> list[Weight]:
    return [Weight(part, (2 * inner, hidden), copies, split), Weight(part, (hidden, inner), copies, split)]


def mtp_weights(model: ModelConfig) -> list[Weight]:
    """Weights of one multi-token-prediction depth (arXiv 2412.19437, section 2.2).

    Norms of the next embedding and of the hidden state, a projection of both together, a layer like the model's last,
    and a final norm.
    """
    hidden = model.hidden_size
    own = [Weight("norms", (hidden,), copies=3), Weight("attention", (hidden, 2 * hidden), split="tp")]
    return own + layer_weights(model, moe=bool(model.moe_layer_pattern[-1]))


def _embedding(model: ModelConfig) -> Weight:
    return Weight("embedding", (model.padded_vocab_size, model.hidden_size), split="tp")


def _output_head(model: ModelConfig) -> Weight:
    return Weight("output_head", (model.padded_vocab_size, model.hidden_size), split="tp")


def _decoder_weights(model: ModelConfig) -> list[Weight]:
    """Weights of all transformer layers of the main model."""
    pattern = model.moe_layer_pattern
    kinds = ((False, pattern.count(0)), (True, pattern.count(1)))
    return [replace(w, copies=w.copies * count) for moe, count in kinds if count for w in layer_weights(model, moe)]


def _total(weights: Iterable[Weight], part: str | None = None) -> int:
    return sum(w.numel for w in weights if part is None or w.part == part)


def _idle(model: ModelConfig, weights: Iterable[Weight]) -> int:
    """Elements of the routed experts that one token does not visit."""
    routed = _total(weights, "routed_experts")
    return routed - routed // model.num_experts * model.topk if routed else 0


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model by part, with what multi-token prediction adds held apart."""
    decoder = _decoder_weights(model)
    mtp = mtp_weights(model) * model.mtp_num_layers
    pattern = model.moe_layer_pattern
    biases = model.num_experts if model.router_bias else 0
    return ParameterCount(
        embedding=_embedding(model).numel,
        output_head=0 if model.tie_embeddings else _output_head(model).numel,
        norms=_total(decoder, "norms") + model.hidden_size,  # and the final norm
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
    """FLOPs of one token's forward pass; what is counted is said in `flops_per_token`."""
    linear = [*_decoder_weights(model), _output_head(model)]
    layers = model.num_layers
    if include_mtp:
        linear += [*mtp_weights(model), _output_head(model)] * model.mtp_num_layers
        layers += model.mtp_num_layers
    matrices = [w for w in linear if len(w.shape) == 2]
    attended = seq_length / 2 if causal else seq_length
    if model.attention == "mla":
        head = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    else:
        head = 2 * model.attention_head_dim
    scores_and_values = 2 * attended * model.num_attention_heads * head * layers
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


def parameters_on_rank(
    model: ModelConfig,
    stages: Sequence[Sequence[str]],
    pp_rank: int = 0,
    *,
    pp: int = 1,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
    bf16_layers: Collection[int] = (),
) -> RankParameters:
    """Parameters that Megatron-Core puts on one rank of pipeline stage `pp_rank`; ranks of one stage hold equally many.

    Args:
        stages: letters of each stage in the order that tokens pass them, pp x vpp lists of "E" (embedding), "t"
            (layer), "m" (MTP depth), "L" (loss, with the output head). Chunk v of rank p is stages[v * pp + p].
        bf16_layers: layers (from 0) whose weights are not among the `linear` ones.

    Raises:
        ValueError: a weight does not divide over the ranks. Validation of the layout catches it first.
    """
    shared = experts = expert_bias = linear = 0
    passed = 0  # layers of earlier stages
    for index, items in enumerate(stages):
        if index % pp == pp_rank:
            weights = _chunk_weights(model, items, passed)
            shared += sum(_local_numel(w, tp, ep, etp) for w in weights if w.split != "expert")
            experts += sum(_local_numel(w, tp, ep, etp) for w in weights if w.split == "expert")
            if model.router_bias:  # every rank keeps the bias of all experts
                expert_bias += sum(w.shape[0] * w.copies for w in weights if w.part == "router")
            layers = range(passed, passed + list(items).count("t"))
            fp8 = [layer_weights(model, bool(model.moe_layer_pattern[i])) for i in layers if i not in bf16_layers]
            fp8 += [mtp_weights(model)] * list(items).count("m")
            linear += sum(_local_numel(w, tp, ep, etp) for one in fp8 for w in one if w.multiplies_in_fp8)
        passed += list(items).count("t")
    return RankParameters(shared, experts, expert_bias, linear)


def _chunk_weights(model: ModelConfig, items: Sequence[str], first_layer: int) -> list[Weight]:
    """Weights of one pipeline chunk, copies that pipeline parallelism makes included (GPTModel.__init__ upstream)."""
    depths = list(items).count("m")
    weights = [_embedding(model)] if "E" in items or depths else []  # MTP embeds the next tokens: a copy on its stage
    last_layer = first_layer + list(items).count("t")
    for moe in model.moe_layer_pattern[first_layer:last_layer]:
        weights += layer_weights(model, bool(moe))
    weights += mtp_weights(model) * depths
    # With MTP the final norm stands behind the last layer, without it on the last stage.
    has_final_norm = first_layer < last_layer == model.num_layers if model.mtp_num_layers else "L" in items
    if has_final_norm:
        weights.append(Weight("norms", (model.hidden_size,)))
    if "L" in items and not (model.tie_embeddings and "E" in items):
        weights.append(_output_head(model))
    return weights


def _local_numel(weight: Weight, tp: int, ep: int, etp: int) -> int:
    """Elements of `weight` on one rank."""
    parts = {"none": 1, "tp": tp, "expert": ep * etp}[weight.split]
    if weight.numel % parts:
        raise ValueError(f"{weight.copies} x {weight.shape} of {weight.part} does not divide over {parts} ranks")
    return weight.numel // parts
