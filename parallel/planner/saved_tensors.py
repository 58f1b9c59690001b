"""Saved tensors: what norms, linear layers and SwiGLU keep for their backward pass, in bytes. No torch import.

Everything is a dictionary from the name of a saved tensor to its bytes: two modules that keep the same tensor use the
same name, and it counts once. `BACKENDS` is the table of what differs between the two implementations of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.architecture.parts import Linear, Shard
from parallel.fp8_recipes import RECIPES
from parallel.planner.workload import Workload

Saved = dict[str, float]
INDEX = 8  # bytes of an int64 index
FP32 = 4


@dataclass(frozen=True)
class Backend:
    """What one implementation keeps.

    Args:
        norm_keeps_fp32: an RMSNorm keeps its input and the normalised input in fp32; else its input unchanged.
        norm_in_linear: norms before gqa's qkv, dense feed-forward and mla's up-projections are part of that linear
            layer, so that `layernorm` cannot recompute them and `mla_up_proj` recomputes mla's with it.
        pads_values: attention wants keys and values of one size.
        expands_keys: attention wants as many key/value heads as query heads.
        gathers_sequence: context parallelism gathers all keys and values; else they go around in a ring.
        separate_rope: rotary embedding keeps its cosines and sines.
    """

    norm_keeps_fp32: bool
    norm_in_linear: bool
    pads_values: bool
    expands_keys: bool
    gathers_sequence: bool
    separate_rope: bool


BACKENDS = {
    "local": Backend(
        norm_keeps_fp32=True, norm_in_linear=False, pads_values=True, expands_keys=True, gathers_sequence=True,
        separate_rope=True,
    ),
    "te": Backend(
        norm_keeps_fp32=False, norm_in_linear=True, pads_values=False, expands_keys=False, gathers_sequence=False,
        separate_rope=False,
    ),
}  # fmt: skip


def linear_input(workload: Workload, name: str, tokens: float, width: float, copies: int = 1) -> Saved:
    """Input of a linear layer: unchanged (shared with other modules that keep it), or one FP8 copy for each layer."""
    if workload.fp8 is None:
        return {name: workload.element * tokens * width}
    return {f"{name} in fp8": copies * RECIPES[workload.fp8].element_bytes * tokens * width}


def linear_inputs(workload: Workload, linears: Iterable[Linear]) -> Saved:
    """Inputs that linear layers keep. Layers that read one tensor share it, but for a copy of each in FP8."""
    readers: dict[str, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.source, []).append(linear)
    kept: Saved = {}
    for source, its in readers.items():
        first = its[0]
        width = first.inputs_on_rank(getattr(workload.layout, first.degree))
        kept |= linear_input(workload, source, input_tokens(workload, first), width, copies=len(its))
    return kept


def input_tokens(workload: Workload, linear: Linear) -> float:
    """Tokens of the input that a linear layer keeps: with sequence parallelism those of this rank, unless all tokens
    were gathered before, for the layer that splits its columns."""
    if linear.experts:
        return workload.expert_tokens
    return workload.tokens if linear.shard is Shard.ROW else workload.split_tokens


def norm(workload: Workload, name: str, tokens: float, width: float, source: str, source_width: float = 0) -> Saved:
    """RMSNorm over `width`. `source` names its input, which may be a part of a tensor that is `source_width` wide."""
    input_bytes = workload.element * tokens * (source_width or width)
    root = {f"{name}: 1 / root": FP32 * tokens}
    if not norm_keeps_fp32(workload):
        return {source: input_bytes, **root}
    normalised = {f"{name}: normalised": FP32 * tokens * width}
    if workload.dtype == "fp32":
        return {source: input_bytes, **normalised, **root}
    return {f"{name}: input in fp32": FP32 * tokens * width, **normalised, **root}


def norm_keeps_fp32(workload: Workload) -> bool:
    """In fp32 on a CPU the local backend has a norm of its own (moe_train.model.local.norm.NormOnCPU)."""
    return BACKENDS[workload.backend].norm_keeps_fp32 and not (workload.on_cpu and workload.dtype == "fp32")


def _own_swiglu(workload: Workload) -> bool:
    """Whether the activation keeps gate and up alone (moe_train.model.local.swiglu)."""
    return workload.on_cpu and workload.backend == "local"


def swiglu(
    workload: Workload, name: str, down: Linear, *, fused: bool, weighted: bool = False, recomputed: bool = False
) -> Saved:
    """Gate and up, what the unfused function keeps between them, router weights, and the input of the layer `down`."""
    e, tokens = workload.element, input_tokens(workload, down)
    inner = down.inputs_on_rank(getattr(workload.layout, down.degree))
    kept = {f"{name}: gate and up": e * tokens * 2 * inner}
    if weighted:
        kept[f"{name}: router weights"] = FP32 * tokens
    if recomputed:
        return kept
    if not fused and not _own_swiglu(workload):
        kept |= {f"{name}: silu": e * tokens * inner, f"{name}: up": e * tokens * inner}
    if not fused and weighted:
        kept[f"{name}: silu x up"] = e * tokens * inner
    return kept | linear_inputs(workload, [down])


def layer_norm(workload: Workload, name: str, source: str, modules: frozenset[str]) -> tuple[Saved, bool]:
    """A norm of the hidden state that is not fused, and whether its output is saved for the layers that read it."""
    width = workload.model.hidden_size
    if "layernorm" in modules:
        return {source: workload.element * workload.split_tokens * width}, False
    return norm(workload, name, workload.split_tokens, width, source), True
