"""What a transformer layer consists of: the one description that everything else reads. No torch import.

Parameter counts and FLOPs (`moe_train.model.arithmetic`), names and shapes in checkpoints
(`moe_train.model.megatron_names`), the rules for widths on a rank (`moe_train.config.rules`), activation memory and
layer times (`parallel.planner`) are computed from it. It is part of `parallel`, because the planner needs it and does
not import `moe_train`.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.architecture.attention import Attention, attention_kind
from parallel.architecture.parts import Linear, Model, Norm, Shard, Tensor, Width, hidden_width

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
EXPERTS = "mlp.experts.experts."


@dataclass(frozen=True)
class GatedMLP:
    """A SwiGLU feed-forward, or all routed experts: gate and up in one linear layer, and down."""

    up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Both of them."""
        return (self.up, self.down)


@dataclass(frozen=True)
class MixtureOfExperts:
    """Router, routed experts, and perhaps shared ones.

    Args:
        shared_gate: scales the output of the shared experts.
        selection_bias: of the router, one for each expert.
    """

    router: Linear
    routed: GatedMLP
    shared: GatedMLP | None
    shared_gate: Linear | None
    selection_bias: Tensor | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer."""
        shared = self.shared.linears if self.shared else ()
        gate = (self.shared_gate,) if self.shared_gate else ()
        return (self.router, *self.routed.linears, *shared, *gate)


@dataclass(frozen=True)
class Layer:
    """A transformer layer: attention, and a dense feed-forward or experts behind a norm."""

    attention: Attention
    norm: Norm
    dense: GatedMLP | None = None
    experts: MixtureOfExperts | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer."""
        dense = self.dense.linears if self.dense else ()
        experts = self.experts.linears if self.experts else ()
        return (*self.attention.linears, *dense, *experts)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every norm."""
        return (self.attention.norm, *self.attention.norms, self.norm)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of a checkpoint."""
        bias = self.experts.selection_bias if self.experts else None
        return (*tensors_of(*self.norms, *self.linears), *((bias,) if bias else ()))


def tensors_of(*modules: Norm | Linear) -> tuple[Tensor, ...]:
    """Tensors of all these modules."""
    return tuple(tensor for module in modules for tensor in module.tensors())


def describe_layer(model: Model, moe: bool) -> Layer:
    """One transformer layer, with routed experts or with a dense feed-forward."""
    attention, hidden = attention_kind(model).describe(model), model.hidden_size
    if moe:
        return Layer(attention, Norm("pre_mlp_layernorm.weight", hidden), experts=_experts(model))
    norm = Norm("mlp.linear_fc1.layer_norm_weight", hidden, "pre_mlp_layernorm.weight")
    inner = Width("ffn_hidden_size", (model.ffn_hidden_size,))
    return Layer(attention, norm, dense=_gated_mlp(model, "dense_ffn", "mlp.", inner, "feed-forward", ("mlp",)))


def _experts(model: Model) -> MixtureOfExperts:
    hidden, count = hidden_width(model), model.num_experts
    source, modules = "feed-forward input", ("shared_experts", "moe")
    shared = gate = bias = None
    if model.num_shared_experts:  # upstream makes one wide expert of all shared ones
        prefix = "mlp.shared_experts."
        shared = _gated_mlp(model, "shared_experts", prefix, _shared_width(model), "shared experts", modules)
        if model.shared_expert_gate:
            gate = Linear(
                "shared_experts", f"{prefix}gate_weight", Width("", (1,)), hidden, Shard.REPLICATED, source,
                quantised=False, recomputed_by=modules,
            )  # fmt: skip
    if model.router_bias:
        bias = Tensor("mlp.router.expert_bias", "router", (count,), trained=False)
    router = Linear(
        "router", "mlp.router.weight", Width("num_experts", (count,)), hidden, Shard.REPLICATED, source,
        quantised=False, recomputed_by=("moe",),
    )  # fmt: skip
    inner = Width("moe_ffn_hidden_size", (model.moe_ffn_hidden_size,))
    routed = _gated_mlp(
        model, "routed_experts", EXPERTS, inner, "routed experts", ("moe",), source="routed expert input", experts=count
    )
    return MixtureOfExperts(router, routed, shared, gate, bias)


def describe_mtp(model: Model) -> tuple[Linear, tuple[Norm, ...]]:
    """What a multi-token-prediction depth has in addition to a layer (arXiv 2412.19437, section 2.2): the projection of
    the next embedding and the hidden state, norms of both, and a final norm."""
    hidden = model.hidden_size
    both = Width("hidden_size", (hidden,), copies=2)
    projection = Linear("attention", "eh_proj.weight", hidden_width(model), both, Shard.COLUMN, "projection input")
    return projection, tuple(Norm(f"{name}.weight", hidden) for name in ("enorm", "hnorm", "final_layernorm"))


def mtp_tensors(model: Model) -> tuple[Tensor, ...]:
    """Tensors of a multi-token-prediction depth in addition to those of its layer."""
    projection, norms = describe_mtp(model)
    return tensors_of(*norms, projection)


def embedding(model: Model) -> Tensor:
    """The embedding, with its vocabulary padded."""
    return Tensor(EMBEDDING, "embedding", (model.padded_vocab_size, model.hidden_size), divided="tp")


def output_head(model: Model) -> Tensor:
    """The output head."""
    return Tensor(HEAD, "output_head", (model.padded_vocab_size, model.hidden_size), divided="tp")


def final_norm(model: Model) -> Tensor:
    """The norm in front of the output head."""
    return Tensor(FINAL_NORM, "norms", (model.hidden_size,))


def _shared_width(model: Model) -> Width:
    """All shared experts together: a width of its own, or as many as there are of a routed one."""
    if model.shared_expert_ffn_hidden_size:
        return Width("shared_expert_ffn_hidden_size", (model.shared_expert_width,))
    count, width = model.num_shared_experts, model.moe_ffn_hidden_size
    meaning = f"model.num_shared_experts x moe_ffn_hidden_size = {count} x {width}"
    return Width("moe_ffn_hidden_size", (model.shared_expert_width,), meaning=meaning)


def _gated_mlp(
    model: Model, part: str, prefix: str, inner: Width, name: str, recomputed_by: tuple[str, ...], *,
    source: str = "feed-forward input", experts: int = 0,
) -> GatedMLP:  # fmt: skip
    both = Width(inner.field, inner.terms, copies=2, meaning=inner.meaning)
    return GatedMLP(
        Linear(part, f"{prefix}linear_fc1.weight", both, hidden_width(model), Shard.COLUMN, source, experts,
               recomputed_by=recomputed_by),
        Linear(part, f"{prefix}linear_fc2.weight", hidden_width(model), inner, Shard.ROW, f"{name}: down input",
               experts, recomputed_by=recomputed_by),
    )  # fmt: skip
