"""Which rows of which Hugging Face tensor are which rows of a Megatron tensor, for a whole model. No torch import.

Megatron concatenates and reorders Hugging Face tensors by rows and never changes a number, so both directions, and any
part of a tensor, follow from one list of row blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moe_train.config.model import ModelConfig
from moe_train.conversion.families import FAMILIES
from moe_train.conversion.hf.names import Kind, Rule, Table
from moe_train.model.arithmetic import count_parameters
from moe_train.model.megatron_names import Shapes, layer_places, layer_shapes, model_shapes, mtp_shapes
from parallel.architecture.layers import EMBEDDING, EXPERTS
from parallel.errors import CheckpointError, ConfigError

_MOST_EXPERTS = 1_000_000
"""In all layers. The largest released models have some 25,000."""
_FEW_EXPERTS, _SURPLUS = 10_000, 4

Blocks = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Fused:
    """Position of a part in a Hugging Face tensor of all experts: rows `part` of `parts` of expert `expert`."""

    name: str
    expert: int
    part: int
    parts: int


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor, whose rows are rows `blocks` of the Megatron piece, in that order."""

    name: str
    blocks: Blocks
    fused: Fused | None = None
    copies: tuple[str, ...] = ()
    """Other names under which a checkpoint may hold the same numbers again."""
    other: str | None = None
    """Name of the tensor in another layout of the same family, where `name` is not there."""

    @cached_property
    def rows(self) -> int:
        """Rows of the Hugging Face tensor."""
        return sum(stop - start for start, stop in self.blocks)


@dataclass(frozen=True)
class Piece:
    """A Megatron tensor [rows, *tail], or the `index`-th [rows, *tail] of one that stacks `count` of them."""

    key: str
    index: int | None
    count: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    kind: Kind
    quantised: bool

    @property
    def rows(self) -> int:
        """Rows in Megatron, with those that only pad."""
        return self.shape[0]

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole Megatron tensor."""
        return self.shape if self.index is None else (self.count, *self.shape)

    @property
    def keeps_fp32(self) -> bool:
        """Selection biases of experts are summed up in small steps, which bf16 would lose."""
        return self.key.endswith("expert_bias")

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor `part`."""
        return (part.rows, *self.shape[1:])


def refuse_larger(model: ModelConfig, stored: int, where: Path) -> None:
    """Raise CheckpointError where a large `model` has far more parameters than a checkpoint has numbers `stored`.

    Every tensor of a model is listed before one is read, and a config can describe any number of them.
    """
    parameters = count_parameters(model).total
    if model.num_layers * model.num_experts > _FEW_EXPERTS and parameters > _SURPLUS * stored:
        raise CheckpointError(
            f"{where} describes a model of {parameters:,} parameters, and the checkpoint holds {stored:,} numbers",
            f"restore the missing files, or the {where.name} that belongs to these weights",
        )


def pieces(model: ModelConfig) -> list[Piece]:
    """Every piece of `model`, in the order of its layers.

    Raises:
        ConfigError: the model has a part for which its family has no name, or too many tensors.
    """
    if model.num_layers * max(1, model.num_experts) > _MOST_EXPERTS:
        raise ConfigError(
            f"model.num_layers={model.num_layers} with model.num_experts={model.num_experts} has more than "
            f"{_MOST_EXPERTS:,} experts",
            "restore the config that belongs to these weights",
        )
    family = FAMILIES[model.family]
    result = [*_rename(model, model_shapes(model), family.model, "", "", None, 1)]
    stacked = 1 if model.is_moe else model.num_layers
    for place in layer_places(model):
        names = f"model.layers.{place.number}."
        shapes = layer_shapes(model, place.moe)
        count = 1 if place.stacked_index is None else stacked
        result += _rename(model, shapes, family.layer, place.prefix, names, place.stacked_index, count)
    for depth in range(model.mtp_num_layers):
        names = f"model.layers.{model.num_layers + depth}."
        result += _rename(model, mtp_shapes(model), family.mtp, f"mtp.layers.{depth}.", names, None, 1)
    return result


def _rename(
    model: ModelConfig, shapes: Shapes, table: Table, prefix: str, names: str, index: int | None, count: int
) -> Iterator[Piece]:
    for suffix, shape in shapes.items():
        rule = table.get(suffix)
        if rule is None:
            raise ConfigError(
                f"model.family={model.family} has no Hugging Face name for {prefix}{suffix}",
                f"set model.family to one of {', '.join(FAMILIES)} that has this part, or switch the part off",
            )
        experts = range(model.num_experts) if suffix.startswith(EXPERTS) else (None,)
        for expert in experts:
            parts = tuple(_parts(model, rule, shape, prefix + suffix, names, expert))
            at, of = (index, count) if expert is None else (expert, model.num_experts)
            yield Piece(prefix + suffix, at, of, shape, parts, rule.kind, rule.quantised)


def _parts(
    model: ModelConfig, rule: Rule, shape: tuple[int, ...], key: str, names: str, expert: int | None
) -> Iterator[Part]:
    for number, (name, blocks) in enumerate(zip(rule.names, _blocks(model, rule.kind, shape[0]), strict=True)):
        fused = None
        if expert is not None and rule.fused is not None:
            fused = Fused(names + rule.fused[0], expert, rule.fused[1] + number, rule.fused[2])
        other = names + rule.others[number] if rule.others else None
        yield Part(names + name.format(expert=expert), blocks, fused, _copies(model, key), other)


def _copies(model: ModelConfig, key: str) -> tuple[str, ...]:
    copies = FAMILIES[model.family].mtp_copies
    layers = range(model.num_layers, model.num_layers + model.mtp_num_layers)
    copies_of_key = [f"model.layers.{number}.{copies[key]}" for number in layers] if key in copies else []
    if key == EMBEDDING and model.tie_embeddings:
        copies_of_key += ["lm_head.weight", *(f"model.layers.{n}.shared_head.head.weight" for n in layers if copies)]
    return tuple(copies_of_key)


def _blocks(model: ModelConfig, kind: Kind, rows: int) -> list[Blocks]:
    """Rows of the Megatron piece that each Hugging Face tensor fills."""
    if kind is Kind.VOCABULARY:
        return [((0, model.vocab_size),)]
    if kind is Kind.GATED:
        return [((0, rows // 2),), ((rows // 2, rows),)]
    if kind is not Kind.QKV:
        return [((0, rows),)]
    size, groups = model.attention_head_dim, model.kv_heads
    queries = model.num_attention_heads // groups * size
    each = queries + 2 * size
    starts = range(0, groups * each, each)
    return [
        tuple((start, start + queries) for start in starts),
        tuple((start + queries, start + queries + size) for start in starts),
        tuple((start + queries + size, start + each) for start in starts),
    ]
