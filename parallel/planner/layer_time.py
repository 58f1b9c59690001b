"""Time of one transformer layer on one rank, forward and backward, part by part. No torch import.

Every layer is a list of `Part`s: GEMMs by shape, attention, bytes through memory, messages. Recomputation
adds the forward time of what it recomputes to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from parallel.architecture.attention import Attention, AttentionCore
from parallel.architecture.layers import GatedMLP, MixtureOfExperts, describe_mtp
from parallel.architecture.parts import Linear, Shard
from parallel.dispatchers import DISPATCHERS
from parallel.fp8_recipes import RECIPES
from parallel.planner import kernels, network
from parallel.planner.attention_costs import costs_of
from parallel.planner.calibration import Calibration
from parallel.planner.hardware import MICRO, Hardware
from parallel.planner.network import Group, Routing
from parallel.planner.software import Software
from parallel.planner.workload import Workload

# Scales of MXFP8 must lie in the order of the tensor cores. Where casts do not write them so (TransformerEngine until
# 2026, pull request 2630), forward and backward of a product start so many kernels that clear and reorder them, which
# read and write them once more.
SCALE_KERNELS, SCALE_BYTES = (4, 6), 2 * 2 / 32


@dataclass(frozen=True)
class Machine:
    """What a layer runs on: accelerator, software, constants."""

    hardware: Hardware
    software: Software
    constants: Calibration


@dataclass
class Times:
    """Seconds by part, of a forward pass, and of a backward pass to inputs and to weights; kernels that are started.

    `graphed_forward` and `graphed_backward` are the kernels among them that CUDA graphs of attention and router start.
    """

    forward: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    recompute: dict[str, float] = field(default_factory=dict)
    kernels_forward: float = 0.0
    kernels_backward: float = 0.0
    graphed_forward: float = 0.0
    graphed_backward: float = 0.0

    def add(
        self, name: str, forward: float, inputs: float = 0.0, weights: float = 0.0, recompute: bool = False
    ) -> None:
        """Count a part; with `recompute` its forward time comes again in the backward pass."""
        for table, value in ((self.forward, forward), (self.inputs, inputs), (self.weights, weights)):
            if value:
                table[name] = table.get(name, 0.0) + value
        if recompute and forward:
            self.recompute[name] = self.recompute.get(name, 0.0) + forward

    def plus(self, other: Times, count: float = 1) -> None:
        """Add `count` times another one."""
        for own, its in (
            (self.forward, other.forward), (self.inputs, other.inputs), (self.weights, other.weights),
            (self.recompute, other.recompute),
        ):  # fmt: skip
            for name, value in its.items():
                own[name] = own.get(name, 0.0) + count * value
        self.kernels_forward += count * other.kernels_forward
        self.kernels_backward += count * other.kernels_backward
        self.graphed_forward += count * other.graphed_forward
        self.graphed_backward += count * other.graphed_backward


def total(parts: dict[str, float], *, without: Iterable[str] = ()) -> float:
    """Seconds of all parts but some."""
    left = set(without)
    return sum(value for name, value in parts.items() if name not in left)


class _Layer:
    """Adds up one layer."""

    def __init__(self, workload: Workload, machine: Machine) -> None:
        self.workload, self.machine = workload, machine
        self.hardware, self.software, self.constants = machine.hardware, machine.software, machine.constants
        self.times = Times()
        self.precision = "fp8" if workload.fp8 else "fp32" if workload.dtype == "fp32" else "bf16"
        self.full = workload.recompute == "full"
        self.modules = workload.recompute_modules if workload.recompute == "selective" else frozenset()
        self.unfused = self.constants.expert_passes(self.software.era)
        self.graphed = False  # whether what comes next lies within the scope of partial CUDA graphs

    def started(self, forward: float, backward: float) -> None:
        """Count kernels that the host starts."""
        self.times.kernels_forward += forward
        self.times.kernels_backward += backward
        if self.graphed:
            self.times.graphed_forward += forward
            self.times.graphed_backward += backward

    def again(self, *modules: str) -> bool:
        """Whether any of these is recomputed."""
        return self.full or bool(self.modules.intersection(modules))

    def linear(
        self, rows: float, outputs: float, inputs: float, *modules: str, copies: int = 1, precision: str = "",
        cast: bool = True, split: str = "",
    ) -> None:  # fmt: skip
        """A linear layer [rows, inputs] -> [rows, outputs], `copies` times; with `cast` what casts to FP8 move.

        With sequence parallelism each rank casts its part before it is gathered: of the inputs of a layer with split
        columns, of the gradient of the outputs of one with split rows (`split`: inputs, outputs).
        """
        kind, hardware, constants = precision or self.precision, self.hardware, self.constants
        forward = kernels.gemm(hardware, constants, kind, rows, outputs, inputs, copies)
        back = kernels.gemm(hardware, constants, kind, rows, inputs, outputs, copies)
        weights = kernels.gemm(hardware, constants, kind, outputs, inputs, rows, copies) / constants.weights_speed
        # gradients are added to those of earlier micro-batches: read and written
        weights += kernels.memory(hardware, 2 * self.workload.grad_bytes * copies * outputs * inputs)
        recipe = RECIPES[self.workload.fp8] if kind == "fp8" and self.workload.fp8 else None
        if recipe is not None and recipe.scaled_blocks:
            forward, back, weights = (one / constants.block_speed for one in (forward, back, weights))
        again = self.again(*modules)
        self.times.add("gemm", forward, back, 0.0 if self.workload.frozen else weights, again)
        # Each expert's product and casts are kernels of their own, which a loop in C++ starts.
        each = 1 if copies == 1 else copies * constants.grouped_kernel
        started = each
        if recipe is not None and cast:
            reordered = recipe.reordered_scales and not self.software.ordered_scales
            moved = recipe.cast_bytes + (SCALE_BYTES if reordered else 0)
            moved *= constants.quantize_passes * (self.unfused if copies > 1 else 1)
            parts = self.workload.layout.tp if self.workload.sequence_parallel else 1
            inward = kernels.memory(hardware, moved * copies * rows * inputs / (parts if split == "inputs" else 1))
            outward = kernels.memory(hardware, moved * copies * rows * outputs / (parts if split == "outputs" else 1))
            self.times.add("quantize", inward, outward, 0.0 if self.workload.frozen else inward + outward, again)
            started += each * recipe.cast_kernels
            if reordered:
                ahead, behind = (count * constants.small_kernel_us * MICRO for count in SCALE_KERNELS)
                self.times.add("quantize", ahead, behind, 0.0, again)
        self.started(started, started + each + (started if again else 0))

    def run(self, linear: Linear, *, rows: float | None = None, copies: int = 1, cast: bool = True) -> None:
        """A linear layer of the description, on the tokens of this rank or on `rows`, for `copies` experts."""
        workload = self.workload
        whole = linear.shard in (Shard.LATENT, Shard.REPLICATED)
        tokens = workload.split_tokens if whole else workload.tokens
        split = {Shard.COLUMN: "inputs", Shard.ROW: "outputs"}.get(linear.shard, "")
        ranks = getattr(workload.layout, linear.degree)
        self.linear(
            tokens if rows is None else rows, linear.outputs_on_rank(ranks), linear.inputs_on_rank(ranks),
            *linear.recomputed_by, copies=copies, precision="" if linear.quantised else "bf16", cast=cast,
            split="" if linear.experts else split,
        )  # fmt: skip

    def moved(
        self, forward: float, backward: float, *modules: str, count: float = 1, name: str = "memory", times: float = 1
    ) -> None:  # fmt: skip
        """Small kernels that move so many bytes so many times."""
        factor = self.constants.memory_passes * times
        hardware, again = self.hardware, self.again(*modules)
        self.times.add(
            name, kernels.memory(hardware, factor * forward), kernels.memory(hardware, factor * backward), 0.0, again
        )
        self.started(count, count * (2 if again else 1))

    def tp(self, gathered: float, scattered: float, *modules: str, gathers: int = 1, cast: bool = True) -> None:
        """Gather so many elements before a module, in so many messages, and scatter so many behind it; the backward
        pass gathers the inputs once more, and the gradients of the outputs. With `cast` they are sent in FP8."""
        workload, group = self.workload, Group(self.workload.layout.tp)
        if group.size <= 1:
            return
        before = network.ring(self.hardware, group, workload.element * gathered, gathers)
        behind = network.ring(self.hardware, group, workload.element * scattered)
        if not workload.sequence_parallel:  # an all-reduce is a scatter and a gather, behind the module and before it
            forward, backward = 2 * behind, 2 * before
        elif workload.fp8 and cast:
            # Inputs are sent once for the GEMM and once more for the gradient of its weights.
            recipe = RECIPES[workload.fp8]
            sent = recipe.sent_bytes
            inputs = network.ring(self.hardware, group, sent * gathered, gathers)
            gradients = network.ring(self.hardware, group, recipe.sent_copies * sent * scattered)
            forward, backward = inputs + behind, gradients + inputs + before
        else:
            forward, backward = before + behind, behind + 2 * before
        exposed = self.constants.tp_exposed if self.software.overlap_tp else 1.0
        self.times.add("tp", exposed * forward, exposed * backward, 0.0, self.again(*modules))

    def attention(self, core: AttentionCore) -> None:
        """Core attention of this rank's heads over the whole sequence, in blocks that context parallelism makes."""
        workload, hardware, software = self.workload, self.hardware, self.software
        heads, groups = core.heads_on_rank(workload.layout.tp), core.kv_heads_on_rank(workload.layout.tp)
        key, value = core.key, core.value
        cp = workload.layout.cp
        keys = workload.seq_length
        flops = workload.tokens * heads * keys * (key + value)  # causal: 2 flops, half of the keys
        latents = software.latent_exchange and core.latent > 0  # gathered: all keys are there at once
        blocks = 1 if latents else cp
        if software.flash_attention:
            again = flops * (3 * key + 2 * value) / (key + value)  # five products for two
            ahead, back = self._fused(flops, keys, blocks, False), self._fused(again, keys, blocks, True)
            self.times.add("attention", ahead, back, 0.0, self.again("core_attn"))
            self.started(2 * blocks, 3 * blocks)
        else:
            self._materialised(heads, key, value, keys)
        if cp > 1:
            width = groups * (key + value)
            if latents:
                width = core.latent
            else:
                self._merged(workload.tokens * heads * key, workload.tokens * heads * value, workload.tokens * width)
            size = workload.element * workload.tokens * cp * width
            # nothing of it turned out to be hidden
            ring = network.relay(hardware, Group(cp, workload.layout.tp), size)
            self.times.add("cp", ring, 2 * ring, 0.0, self.again("core_attn"))

    def _fused(self, flops: float, keys: float, blocks: int, backward: bool) -> float:
        """Seconds in blocks. The mask halves one, which is as slow as so short a sequence; the others are whole."""
        one = partial(
            kernels.attention, self.hardware, self.constants, flash2=self.software.flash2, backward=backward
        )  # fmt: skip
        return one(flops / blocks, keys / blocks) + one(flops - flops / blocks, keys)

    def _merged(self, queries: float, outputs: float, pairs: float) -> None:
        """What the blocks of a context-parallel ring add to attention: so many elements of queries, outputs, keys and
        values of this rank.

        Keys and values are concatenated to be sent. Each further block is of all queries and half of the keys, or
        of half of the queries and all keys, as the causal mask leaves them; its outputs and gradients are added to what
        is there (transformer_engine/pytorch/attention, AttnFuncWithCPAndKVP2P, with the sequence as first dimension).
        """
        further, element = self.workload.layout.cp - 1, self.workload.element
        sums = further * 3 * 3 / 4
        forward = 2 * pairs + 2 * outputs + sums * outputs
        backward = 2 * pairs + 2 * (queries + pairs) + sums * (queries + pairs)
        self.moved(element * forward, element * backward, "core_attn", count=4 * further)

    def _materialised(self, heads: float, key: float, value: float, keys: float) -> None:
        """Scores written to memory: two products over the whole square, mask, softmax and dropout between them."""
        workload, hardware = self.workload, self.hardware
        copies = max(1, round(heads * workload.micro_batch_size))
        rows = workload.seq_length / workload.layout.cp
        products = sum(
            kernels.gemm(hardware, self.constants, "bf16", rows, n, k, copies) for n, k in ((keys, key), (value, keys))
        )
        again = self.again("core_attn")
        self.times.add("attention", products, 2 * products, 0.0, again)
        scores = workload.element * copies * rows * keys
        self.moved(5 * scores, 6 * scores, "core_attn", count=4, times=self.constants.scores_passes)


def layer_times(workload: Workload, machine: Machine, moe: bool) -> Times:
    """Seconds of one layer for one micro-batch on one rank, with routed experts or with a dense feed-forward."""
    layer = _Layer(workload, machine)
    layer.graphed = True
    described = workload.description(moe)
    _attention(layer, described.attention)
    _norms(layer)
    if described.dense:
        _gated_mlp(layer, described.dense)
    if described.experts:
        _moe(layer, described.experts)
    return layer.times


def _norms(layer: _Layer) -> None:
    """Two norms and two residual sums of the hidden state."""
    workload = layer.workload
    size = workload.element * workload.split_tokens * workload.model.hidden_size
    layer.moved(2 * 2 * size, 2 * 3 * size, "layernorm", count=2)
    layer.moved(2 * 3 * size, 2 * 2 * size, count=2)


def _attention(layer: _Layer, attention: Attention) -> None:
    workload = layer.workload
    layer.tp(
        workload.tokens * sum(attention.gathered), workload.tokens * workload.model.hidden_size,
        gathers=len(attention.gathered),
    )  # fmt: skip
    for linear in attention.projections:
        layer.run(linear)
    for item in costs_of(attention.kind).elementwise(workload, attention):
        layer.moved(item.forward, item.backward, *item.recomputed_by, count=item.kernels)
    layer.attention(attention.core)
    layer.run(attention.output)


def _swiglu(layer: _Layer, rows: float, inner: float, *modules: str, times: float = 1) -> None:
    size = layer.workload.element * rows * inner
    layer.moved(3 * size, 5 * size, *modules, times=times)


def _gated_mlp(layer: _Layer, block: GatedMLP) -> None:
    """A dense feed-forward, or the shared experts."""
    workload, modules = layer.workload, block.down.recomputed_by
    layer.tp(workload.tokens * workload.model.hidden_size, workload.tokens * workload.model.hidden_size, *modules)
    layer.run(block.up)
    _swiglu(layer, workload.tokens, block.down.inputs_on_rank(workload.layout.tp), *modules)
    layer.run(block.down)


def _moe(layer: _Layer, experts: MixtureOfExperts) -> None:
    workload, model, software, layout = layer.workload, layer.workload.model, layer.software, layer.workload.layout
    routed = experts.routed
    layer.run(experts.router)
    scores = 4 * workload.split_tokens * model.num_experts
    layer.moved(8 * scores, 6 * scores, "moe", count=8 * layer.unfused + 2, name="router", times=layer.unfused)
    layer.graphed = False
    visits = workload.expert_tokens * software.imbalance
    _dispatch(layer, visits)
    local = max(1, model.num_experts // layout.ep)
    layer.run(routed.up, rows=visits / local, copies=local)
    if not software.fused_experts:
        inner = routed.down.inputs_on_rank(layout.etp)
        _swiglu(layer, visits, inner, "moe", "moe_act", times=layer.unfused)
    layer.run(routed.down, rows=visits / local, copies=local, cast=not software.fused_experts)
    if experts.shared:
        _gated_mlp(layer, experts.shared)


def _dispatch(layer: _Layer, visits: float) -> None:
    """Permutation, the way to the experts and back, un-permutation."""
    workload, model, software, layout = layer.workload, layer.workload.model, layer.software, layer.workload.layout
    r, hidden, e = workload.split_tokens, model.hidden_size, workload.element
    copied = e * hidden * (r + visits / layout.etp)
    layer.moved(2 * copied, 2 * copied, "moe", count=12 * layer.unfused + 2, times=layer.unfused)
    group = Group(layout.ep * layout.etp)
    routing = routing_of(workload)
    dispatcher = DISPATCHERS[software.dispatcher]

    def one(width: float) -> float:
        return network.all_to_all(
            layer.hardware, group, r * software.imbalance, width, routing, dispatcher.deduplicates
        )

    there = one(hidden * (1 + 4 / 128 if software.fp8_dispatch else e))
    back = one(hidden * e)
    if layout.etp > 1:  # tokens are gathered over the ranks that share an expert
        there += network.ring(layer.hardware, Group(layout.etp), e * hidden * visits)
        back += network.ring(layer.hardware, Group(layout.etp), e * hidden * visits)
    if model.pad_to_capacity:
        layer.times.add("capacity", layer.constants.capacity_us * MICRO, recompute=layer.again("moe"))
    elif software.graphs != "full":
        lost = (layer.constants.sync_us if dispatcher.waits_on_host else layer.constants.flex_sync_us) * MICRO
        layer.times.add("sync", lost, lost)
    layer.times.add("all_to_all", there + back, there + back, 0.0, layer.again("moe"))


def routing_of(workload: Workload) -> Routing:
    """How the model's router chooses."""
    model = workload.model
    return Routing(model.topk, model.router_num_groups, model.router_topk_groups)


def embedding_times(workload: Workload, machine: Machine) -> Times:
    """Look-up of the embedding."""
    layer = _Layer(workload, machine)
    size = workload.element * workload.tokens * workload.model.hidden_size
    layer.moved(2 * size, 3 * size)
    layer.times.recompute.clear()  # full recomputation covers transformer layers alone
    return layer.times


def loss_times(workload: Workload, machine: Machine) -> Times:
    """Final norm, output head in 16 bits, cross entropy over this rank's part of the vocabulary."""
    layer = _Layer(workload, machine)
    model = workload.model
    vocabulary = model.padded_vocab_size / workload.layout.tp
    precision = "fp32" if workload.dtype == "fp32" else "bf16"
    layer.tp(workload.tokens * model.hidden_size, 0.0, cast=False)
    layer.linear(workload.tokens, vocabulary, model.hidden_size, precision=precision)
    scores = workload.tokens * vocabulary
    layer.moved(12 * scores, 8 * scores, count=4)
    layer.times.recompute.clear()
    return layer.times


def mtp_times(workload: Workload, machine: Machine, last_layer: Times, loss: Times) -> Times:
    """One multi-token-prediction depth: projection, a layer like the last, and its own pass through head and loss."""
    layer = _Layer(workload, machine)
    projection, _ = describe_mtp(workload.model)
    outputs, inputs = projection.outputs_on_rank(workload.layout.tp), projection.inputs_on_rank(workload.layout.tp)
    layer.linear(workload.tokens, outputs, inputs)
    layer.times.plus(last_layer)
    layer.times.plus(embedding_times(workload, machine))
    layer.times.plus(loss)
    return layer.times
