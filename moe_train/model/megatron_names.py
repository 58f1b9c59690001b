"""Names and shapes of a model's tensors in a Megatron checkpoint, from its config alone. No torch import.

They are the global names that Megatron-Core's sharded state dicts give, with every backend and in every layout. The
first axis of a tensor that holds several pieces numbers experts, or the layers of a dense model, which are stacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moe_train.config.model import ModelConfig
from parallel.architecture.layers import describe_layer, embedding, final_norm, mtp_tensors, output_head
from parallel.architecture.parts import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerPlace:
    """One transformer layer: its prefix in the checkpoint, its number in HF terms, its index on the stacked axis."""

    prefix: str
    number: int
    stacked_index: int | None
    moe: bool


def layer_places(model: ModelConfig) -> Iterator[LayerPlace]:
    """The layers of the main model, then the transformer layer of each multi-token-prediction depth."""
    pattern = model.moe_layer_pattern
    for number, moe in enumerate(pattern):
        if model.is_moe:
            yield LayerPlace(f"decoder.layers.{number}.", number, None, bool(moe))
        else:
            yield LayerPlace("decoder.layers.", number, number, False)
    for depth in range(model.mtp_num_layers):
        prefix = f"mtp.layers.{depth}.transformer_layer."
        yield LayerPlace(prefix, model.num_layers + depth, None, bool(pattern[-1]))


def model_shapes(model: ModelConfig) -> Shapes:
    """Tensors outside layers."""
    tensors = [embedding(model), final_norm(model)]
    return _shapes(tensors if model.tie_embeddings else [*tensors, output_head(model)])


def mtp_shapes(model: ModelConfig) -> Shapes:
    """Tensors of a multi-token-prediction depth in addition to those of its transformer layer."""
    return _shapes(mtp_tensors(model))


def layer_shapes(model: ModelConfig, moe: bool) -> Shapes:
    """Tensors of one layer. Those of routed experts are of one expert."""
    return _shapes(describe_layer(model, moe).tensors)


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return {tensor.name: tensor.shape for tensor in tensors}
