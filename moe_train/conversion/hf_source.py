"""A Hugging Face checkpoint directory as one flat set of tensors in a precision that can be computed with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path

from moe_train.config.model import ModelConfig
from moe_train.conversion import hf_config as config
from moe_train.conversion import quantised_weights
from moe_train.conversion.families import FAMILIES
from moe_train.conversion.hf import quantization
from moe_train.conversion.mapping import Fused, Part, Piece, pieces, refuse_larger
from moe_train.conversion.quantised_weights import QuantisedWeight
from moe_train.formats import nonfinite, safetensors
from moe_train.formats.dtypes import DTYPES, Dtype
from moe_train.formats.tensor_slices import TensorSlice
from parallel.errors import CheckpointError

_BF16 = DTYPES["bfloat16"]


class HuggingFace:
    """The tensors of a directory. Quantised weights read as what they stand for, in bf16."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = config.read(directory)
        self.extents = safetensors.open_directory(directory)
        """Every stored tensor."""
        declared = quantization.of_config(self.config, directory / config.FILE)
        self.quantised = quantised_weights.collect(directory, self.extents, declared)
        """Quantised weights by the name that they have without quantisation."""
        self.parts = {part: name for name, weight in self.quantised.items() for part in weight.names(name)}
        """Tensors of quantised weights -> the weight."""
        plain = {name: extent.shape for name, extent in self.extents.items() if name not in self.parts}
        self.shapes = plain | {name: weight.shape for name, weight in self.quantised.items()}
        """Shapes by name, a quantised weight as one tensor."""

    @property
    def names(self) -> list[str]:
        """Every tensor, a quantised weight as one."""
        return list(self.shapes)

    @property
    def numbers(self) -> int:
        """How many the model has."""
        return sum(prod(shape) for shape in self.shapes.values())

    def dtype(self, name: str) -> Dtype:
        """What `read` returns of the tensor."""
        return _BF16 if name in self.quantised else self.extents[name].dtype

    def read(self, name: str, start: int, stop: int, out: memoryview | None = None) -> TensorSlice:
        """Rows `start` to `stop`, in `out` where it is given and the file has them in that form."""
        weight = self.quantised.get(name)
        return self.extents[name].row_range(start, stop).read(out) if weight is None else weight.read(start, stop)


class MappedSource:
    """A Hugging Face checkpoint read as the pieces of a Megatron checkpoint of `model`.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or belongs to no part of the model.
    """

    def __init__(self, source: HuggingFace, model: ModelConfig) -> None:
        self.source, self.model = source, model
        refuse_larger(model, source.numbers, source.directory / config.FILE)
        self.pieces = pieces(model)
        self._check()

    def _check(self) -> None:
        directory, shapes = self.source.directory, self.source.shapes
        known: set[str] = set()
        for piece in self.pieces:
            for part in piece.parts:
                name = self._stored(part)
                known |= {name, *part.copies}
                whole = name in (part.name, part.other)
                expected = piece.part_shape(part) if whole else _fused_shape(piece, part)
                if name not in shapes:
                    raise CheckpointError(f"{directory} has no tensor {name}", self._remedy(name))
                for stored in (name, *part.copies):
                    if stored in shapes and not (dtype := self.source.dtype(stored)).is_floating_point:
                        raise CheckpointError(
                            f"{directory}: {stored} is {dtype}, and weights are floating-point numbers",
                            "name the checkpoint from before it was quantised",
                        )
                    if stored in shapes and shapes[stored] != expected:
                        raise CheckpointError(
                            f"{directory}: {stored} has shape {list(shapes[stored])}, and a {self.model.family} "
                            f"model with this config has {list(expected)}",
                            "restore the config.json that belongs to these weights",
                        )
        ignored = re.compile("|".join(FAMILIES[self.model.family].ignored))
        for name in self.source.names:
            if name not in known and not ignored.fullmatch(name) and not self._is_unwanted_prediction(name):
                raise CheckpointError(
                    f"{directory} has a tensor {name}, and a {self.model.family} model with this config has none",
                    "restore the config.json that belongs to these weights",
                )

    def _is_unwanted_prediction(self, name: str) -> bool:
        """Whether it is of a multi-token-prediction layer that config.json has and the user has switched off."""
        named = self.source.config.get("num_nextn_predict_layers") or 0
        return named > self.model.mtp_num_layers and _layer(name) >= self.model.num_layers + self.model.mtp_num_layers

    def _remedy(self, name: str) -> str:
        if _layer(name) >= self.model.num_layers:
            return "set model.mtp_num_layers=0 to continue without multi-token prediction, or restore its weights"
        return "restore the missing files or the config.json that belongs to these weights"

    def _stored(self, part: Part) -> str:
        """The tensor that holds this part: its own, that of another layout, or one of all experts."""
        if part.other is not None and part.name not in self.source.shapes and part.other in self.source.shapes:
            return part.other
        if part.fused is not None and part.name not in self.source.shapes:
            for name in (part.fused.name, part.fused.name + ".weight"):
                if name in self.source.shapes:
                    return name
        return part.name

    def quantised(self, part: Part) -> QuantisedWeight | None:
        """The weight in its stored format, None where it is not quantised."""
        return self.source.quantised.get(self._stored(part))

    def dtype(self, piece: Piece) -> Dtype:
        """Stored dtype of the piece; the widest where its parts differ."""
        dtypes = {self.source.dtype(self._stored(part)) for part in piece.parts}
        return max(dtypes, key=lambda dtype: dtype.itemsize)

    def read(self, piece: Piece, start: int, stop: int, dtype: Dtype, out: memoryview | None = None) -> TensorSlice:
        """Rows `start` to `stop` of the piece in `dtype`; in `out` where given. Rows that only pad are zero.

        Raises:
            CheckpointError: what must be copies of one tensor are not equal.
        """
        whole = TensorSlice.empty(dtype, (stop - start, *piece.shape[1:]), out)
        filled = 0
        for part in piece.parts:
            row = 0  # of the part, where the block begins
            for first, last in part.blocks:
                begin, end = max(first, start), min(last, stop)
                if begin < end:
                    target = whole.range(begin - start, end - start).data
                    as_stored = self.source.dtype(self._stored(part)) == dtype
                    rows = self.part_rows(
                        piece, part, row + begin - first, row + end - first, target if as_stored else None
                    )
                    if rows.data is not target:
                        target[:] = narrowed(rows, dtype, part.name).data
                    filled += end - begin
                row += last - first
        if filled < stop - start:  # only the vocabulary has padding, at its end
            padding = whole.range(filled, stop - start).data
            padding[:] = bytes(len(padding))
        return whole

    def part_rows(self, piece: Piece, part: Part, start: int, stop: int, out: memoryview | None = None) -> TensorSlice:
        """Rows of the Hugging Face tensor `part`, in `out` where it is given and the file has them in that form."""
        name = self._stored(part)
        if part.fused is not None and name not in (part.name, part.other):
            return self._fused_rows(name, part.fused, part.rows, start, stop, out)
        rows = self.source.read(name, start, stop, out)
        for copy in part.copies:
            if copy in self.source.shapes and not _same_bits(rows, self.source.read(copy, start, stop)):
                raise CheckpointError(
                    f"{self.source.directory}: {copy} differs from {name}, and the model here has one for both",
                    "such weights cannot be converted",
                )
        return rows

    def _fused_rows(
        self, name: str, fused: Fused, rows: int, start: int, stop: int, out: memoryview | None
    ) -> TensorSlice:
        expert = self.source.extents[name].index(fused.expert)
        first = fused.part * rows
        return expert.row_range(first + start, first + stop).read(out)


def narrowed(rows: TensorSlice, dtype: Dtype, name: str) -> TensorSlice:
    """The rows of the tensor `name` in another precision.

    Raises:
        CheckpointError: it has numbers that the other one cannot hold; they would become infinite.
    """
    if rows.dtype == dtype:
        return rows
    tensor = rows.tensor()
    result = tensor.to(dtype.torch)
    narrow = TensorSlice.of(result)
    if nonfinite.count(dtype, narrow.data).infinite:
        lost = result.isinf() & tensor.isfinite()
        if lost.any():
            import torch

            short, largest = ("fp16", "bf16") if dtype.name == "float16" else (dtype.name, "fp32")
            end = torch.finfo(dtype.torch).max
            raise CheckpointError(
                f"{name} has {tensor[lost].abs().max().item():.3g}, and {short} ends at {end:.5g}",
                f"set convert.dtype={largest}",
            )
    return narrow


def _fused_shape(piece: Piece, part: Part) -> tuple[int, ...]:
    parts = part.fused.parts if part.fused else 1
    return (piece.count, part.rows * parts, *piece.shape[1:])


def _layer(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def _same_bits(a: TensorSlice, b: TensorSlice) -> bool:
    return a.dtype == b.dtype and bytes(a.data) == bytes(b.data)  # views would be compared item by item


def names_of(all_pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors of a model with their shapes, copies included, in the order of its layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in all_pieces:
        for part in piece.parts:
            shapes |= dict.fromkeys((part.name, *part.copies), piece.part_shape(part))
    return shapes
