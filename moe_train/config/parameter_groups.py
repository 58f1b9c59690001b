"""Which parameters have a learning rate and a weight decay of their own, by `optimizer.groups`. No torch import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from moe_train.config.model import ModelConfig
from moe_train.config.optimizer import ADAMW, MUON, OptimizerConfig, ParameterGroup
from parallel.architecture.layers import describe_layer, embedding, final_norm, mtp_tensors, output_head
from parallel.architecture.parts import Tensor

_VOCABULARY = ("embedding", "output_head")
_CLOSE = 0.5  # similarity of names that an error shows, as in difflib


@dataclass(frozen=True)
class GroupSummary:
    """Parameters with the same learning rate, weight decay and optimizer.

    Args:
        match: pattern of the entry of `optimizer.groups`; "" for parameters that none matches.
        tensors: number of tensors; those of all experts of a layer count as one.
        parameters: number of elements of them.
    """

    match: str
    optimizer: str
    lr_multiplier: float
    weight_decay: float
    tensors: int
    parameters: int


def named_parameters(model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every trained tensor with its name in a checkpoint, in which each layer has its number."""
    pattern = model.moe_layer_pattern
    yield from _named("", [embedding(model)])
    for number, moe in enumerate(pattern):
        yield from _named(f"decoder.layers.{number}.", describe_layer(model, bool(moe)).tensors)
    yield from _named("", [final_norm(model), *(() if model.tie_embeddings else (output_head(model),))])
    for depth in range(model.mtp_num_layers):
        yield from _named(f"mtp.layers.{depth}.", mtp_tensors(model))
        prefix = f"mtp.layers.{depth}.transformer_layer."
        yield from _named(prefix, describe_layer(model, bool(pattern[-1])).tensors)


def _named(prefix: str, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + tensor.name, tensor) for tensor in tensors if tensor.trained)


def group_of(name: str, groups: Sequence[ParameterGroup]) -> int | None:
    """Index of the first entry whose pattern matches a parameter, or None."""
    return next((index for index, group in enumerate(groups) if fnmatchcase(name, group.match)), None)


def weight_decay_of(group: ParameterGroup | None, dimensions: int, usual: float) -> float:
    """Weight decay of a parameter: that of its entry, else `usual`, from which norms and biases are exempt."""
    if group is not None and group.weight_decay is not None:
        return group.weight_decay
    return usual if dimensions > 1 else 0.0


def summarise(model: ModelConfig, optimizer: OptimizerConfig) -> list[GroupSummary]:
    """The parameter groups of a run: first those that no entry matches, then each entry's."""
    counts: dict[tuple[int, str, float], tuple[int, int]] = {}
    for name, tensor in named_parameters(model):
        index = group_of(name, optimizer.groups)
        group = None if index is None else optimizer.groups[index]
        decay = weight_decay_of(group, len(tensor.shape), optimizer.weight_decay)
        matrix = len(tensor.shape) > 1 and tensor.part not in _VOCABULARY
        by = MUON if optimizer.name == MUON and matrix else ADAMW
        key = (-1 if index is None else index, by, decay)
        tensors, parameters = counts.get(key, (0, 0))
        counts[key] = (tensors + 1, parameters + tensor.numel)
    return [
        GroupSummary(
            optimizer.groups[index].match if index >= 0 else "",
            by,
            optimizer.groups[index].lr_multiplier if index >= 0 else 1.0,
            decay,
            *counts[index, by, decay],
        )
        for index, by, decay in sorted(counts, key=lambda key: (key[0], key[1] == ADAMW, -key[2]))
    ]


def close_patterns(pattern: str, model: ModelConfig) -> list[str]:
    """Patterns that match parameters of the model and resemble `pattern`, best first."""
    names = [name for name, _ in named_parameters(model)]
    known = list(dict.fromkeys([*map(_without_number, names), *names]))
    return get_close_matches(pattern, known, n=3, cutoff=_CLOSE)


def _without_number(name: str) -> str:
    """A pattern for the parameter in all layers: `decoder.layers.3.mlp.router.weight` -> `*.mlp.router.weight`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return "*." + ".".join(parts[numbers[0] + 1 :]).removeprefix("transformer_layer.") if numbers else name
