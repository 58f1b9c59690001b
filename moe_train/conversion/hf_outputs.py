"""The tensors of a Hugging Face export and how their rows are made, a few at a time.

Writing an export and verifying one both go through the tensors of `Export`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Protocol

from moe_train.config.model import ModelConfig
from moe_train.conversion import hf_config as config
from moe_train.conversion.hf import quantization
from moe_train.conversion.hf_source import narrowed
from moe_train.conversion.mapping import Part, Piece
from moe_train.conversion.quantised_weights import QuantisedWeight
from moe_train.conversion.small_files import SmallFiles
from moe_train.formats.dtypes import DTYPES, Dtype
from moe_train.formats.nonfinite import Tally
from moe_train.formats.tensor_slices import BLOCK_BYTES, FileRegion, TensorSlice
from moe_train.formats.weight_formats import FORMATS, GROUPED, BlockFp8, Choices, StoredTensor, WeightFormat
from parallel.architecture.layers import EMBEDDING, EXPERTS, HEAD
from parallel.errors import CheckpointError, ConfigError

FP32, BF16 = DTYPES["float32"], DTYPES["bfloat16"]
PLAIN = {"fp32": FP32, "bf16": BF16, "fp16": DTYPES["float16"]}
"""Values of `convert.dtype` that keep one tensor for each weight."""
KEPT = ("lm_head",)
"""Default of `convert.keep`."""

# Linear layers that vLLM joins to one, whose weights must have one format.
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"q_a_proj", "kv_a_proj_with_mqa"}, {"w1", "w3"})

Blocks = Callable[["ScratchMemory", Tally], Iterator[TensorSlice]]


class ScratchMemory(Protocol):
    """Memory that is used again for each block."""

    def scratch(self, size: int) -> memoryview:
        """`size` bytes."""


class Reader(Protocol):
    """Where the numbers of Hugging Face tensors come from."""

    def dtype(self, piece: Piece) -> Dtype:
        """Stored dtype of the piece."""

    def part_rows(self, piece: Piece, part: Part, start: int, stop: int, out: memoryview | None = None) -> TensorSlice:
        """Rows of the Hugging Face tensor `part`, in `out` where it is given and the file has them in that form."""

    def quantised(self, part: Part) -> QuantisedWeight | None:
        """The weight in its stored format, None where it is not quantised."""

    def has(self, name: str) -> bool:
        """Whether the copy `name` is wanted."""

    def settle(self) -> None:
        """Check what this thread has read and could not check yet."""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion."""

    dtype: str | None = None
    """A key of PLAIN, or one of FORMATS (Hugging Face only); None keeps that of each tensor."""
    file_bytes: int | None = None
    """About the size of a file; None makes some thirty files, of at most 4 GiB."""
    optimizer: bool = True
    """Whether a Megatron copy of a Megatron checkpoint keeps the optimizer."""
    power_of_two_scales: bool = True
    allow_nonfinite: bool = False
    """Whether NaN and infinite numbers are written unchanged."""
    group_size: int | None = None
    """Inputs that share a scale, for the formats in GROUPED."""
    keep: tuple[str, ...] = KEPT
    """Patterns of linear layers that are not quantised."""
    ema: bool = False
    """Whether the EMA of the weights is read, from a checkpoint of a run."""

    def format(self) -> WeightFormat | None:
        """The format of quantised weights, None where they are not.

        Raises:
            ConfigError: an option has no effect on the format.
        """
        if self.group_size is not None and self.dtype not in GROUPED:
            raise ConfigError(
                f"convert.group_size={self.group_size} has no effect with convert.dtype={self.dtype or 'null'}",
                f"leave it out, or set convert.dtype to {' or '.join(GROUPED)}",
            )
        if self.dtype not in FORMATS:
            if self.keep != KEPT:
                raise ConfigError(
                    f"convert.keep=[{','.join(self.keep)}] has no effect with convert.dtype={self.dtype or 'null'}",
                    f"leave it out, or set convert.dtype to one of {', '.join(FORMATS)}",
                )
            return None
        return FORMATS[self.dtype](Choices(self.group_size, self.power_of_two_scales))

    def refuse_quantised(self) -> None:
        """Raise ConfigError where a Megatron checkpoint could not hold what is asked for."""
        if self.format() is not None:
            raise ConfigError(
                f"convert.dtype={self.dtype} is a Hugging Face format", "use convert.dtype=bf16 or convert.to=hf"
            )


def wanted(options: ConvertOptions, piece: Piece, stored: Dtype) -> Dtype:
    """The precision of a piece that is not quantised."""
    if piece.keeps_fp32:
        return FP32
    if options.dtype is None:
        return stored
    return PLAIN.get(options.dtype, BF16)


@dataclass(frozen=True)
class TensorOutput:
    """One tensor of a safetensors file and its rows, a block at a time."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    blocks: Blocks
    weight: str | None = None
    """The quantised weight that it belongs to."""

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return prod(self.shape) * self.dtype.itemsize


def group_bytes(group: Sequence[TensorOutput]) -> int:
    """Of all tensors of a group."""
    return sum(output.bytes for output in group)


class Export:
    """Tensors of a Hugging Face directory, and what its config.json says of them.

    Raises:
        ConfigError: a weight does not fit the format, or experts would be in several formats.
    """

    def __init__(self, reader: Reader, all_pieces: Sequence[Piece], options: ConvertOptions) -> None:
        self._reader, self._options = reader, options
        self.format = options.format()
        self._kept: list[str] = []
        self._ragged: dict[str, tuple[int, ...]] = {}
        """Layers with several blocks of FP8 of which the last is smaller: module -> shape."""
        self._modules = {module_of(part.name) for p in all_pieces for part in p.parts if len(p.shape) == 2}
        if self.format is not None:
            self._check(all_pieces, self.format)
        self.groups = [self._outputs(piece, part) for piece in all_pieces for part in piece.parts]
        """Tensors that lie in one file, in order: a weight and its scales, or a tensor and its copies."""

    def config(self, model: ModelConfig, small: SmallFiles) -> dict[str, Any]:
        """config.json."""
        weights = {o.dtype for group in self.groups for o in group if len(o.shape) == 2 and o.weight is None}
        common = BF16 if self.format is not None else min(weights, key=lambda d: d.itemsize)
        written = config.to_hf(model, common.name, small.original) | small.tokens
        if self.format is not None:
            written[quantization.KEY] = quantization.to_config(self.format, self._declared())
        return written

    def remarks(self) -> list[str]:
        """What a user should know before loading the export."""
        if not isinstance(self.format, BlockFp8) or not self._ragged:
            return []
        name, shape = next(iter(self._ragged.items()))
        if any(".experts." in module for module in self._ragged):
            remedy = "convert.dtype=int8 has no blocks"
        else:
            remedy = f"{self._keeping(self._ragged)} keeps them in bf16"
        cause = (
            f"transformers cannot dequantise FP8 of {len(self._ragged):,} layers, such as {name} {list(shape)}, whose "
            f"last block has fewer than {self.format.block_rows} rows or columns"
        )
        return [f"{cause}; {remedy}"]

    def _declared(self) -> list[str]:
        """Modules that config.json lists as not quantised. Loaders of FP8 have their own list without one."""
        if self._options.dtype == "fp8" and self._options.keep == KEPT:
            return []
        return self._kept

    def _check(self, all_pieces: Sequence[Piece], weights: WeightFormat) -> None:
        """Sort linear layers into those that are quantised and those that are kept; refuse what no loader reads."""
        wrong: dict[str, int] = {}
        self._refuse_unused_patterns()
        for piece in all_pieces:
            for part in piece.parts:
                if len(piece.shape) != 2 or piece.key == EMBEDDING:
                    continue
                if not self._quantised(piece, part):
                    self._kept += [module_of(name) for name in (part.name, *part.copies)]
                    self._refuse_mixed_experts(piece, part)
                    continue
                if weights.group is not None and piece.shape[1] % weights.group:
                    wrong[module_of(part.name)] = piece.shape[1]
                if any(n > weights.block_rows and n % weights.block_rows for n in piece.part_shape(part)):
                    self._ragged[module_of(part.name)] = piece.part_shape(part)
        if wrong:
            name, columns = next(iter(wrong.items()))
            raise ConfigError(
                f"{name} has {columns} inputs, which are not a multiple of {weights.group} ({weights.text})",
                self._remedy(all_pieces, weights, sorted(wrong)),
            )

    def _keeping(self, modules: Iterable[str]) -> str:
        """`convert.keep` with these layers, and those that vLLM fuses with them."""
        patterns: set[str] = set()
        for module in modules:
            parent, _, own = module.rpartition(".")
            together = next((group for group in _FUSED if own in group), {own})
            patterns |= {f"*.{parent.rpartition('.')[2]}.{n}" for n in together if f"{parent}.{n}" in self._modules}
        kept = ",".join([*self._options.keep, *sorted(patterns)])
        return f"'convert.keep=[{kept}]'"  # a shell would look for files of such names

    def _refuse_unused_patterns(self) -> None:
        for pattern in self._options.keep:
            if pattern not in KEPT and not fnmatch.filter(self._modules, pattern):
                raise ConfigError(
                    f"convert.keep has {pattern}, which is the name of no linear layer",
                    f"name modules like {min(m for m in self._modules if '.layers.' in m)}, with * for any text",
                )

    def _quantised(self, piece: Piece, part: Part) -> bool:
        if self.format is None or not (piece.quantised or piece.key == HEAD):
            return False
        module = module_of(part.name)
        return not any(fnmatch.fnmatchcase(module, pattern) for pattern in self._options.keep)

    def _refuse_mixed_experts(self, piece: Piece, part: Part) -> None:
        if EXPERTS in piece.key:
            raise ConfigError(
                f"convert.keep leaves {module_of(part.name)} in bf16, and transformers loads the routed experts of a "
                "quantised model in one format",
                "remove routed experts from convert.keep",
            )

    def _remedy(self, all_pieces: Sequence[Piece], weights: WeightFormat, wrong: list[str]) -> str:
        """A group size that fits all layers, else the layers to keep."""
        columns = [p.shape[1] for p in all_pieces for part in p.parts if len(p.shape) == 2 and self._quantised(p, part)]
        fitting = gcd(*columns, 128)
        if fitting >= 8:
            dtype = "" if weights.name in GROUPED else "convert.dtype=int4 "
            return f"set {dtype}convert.group_size={fitting}"
        if any(".experts." in name for name in wrong):
            return "set convert.dtype=int8, which has one scale for each row"
        return f"set {self._keeping(wrong)}, or convert.dtype=int8"

    def _outputs(self, piece: Piece, part: Part) -> list[TensorOutput]:
        shape = piece.part_shape(part)
        names = [part.name, *(name for name in part.copies if self._reader.has(name))]
        if self.format is not None and len(shape) == 2 and self._quantised(piece, part):
            return [o for name in names for o in self._quantised_outputs(piece, part, name, self.format)]
        dtype = wanted(self._options, piece, self._reader.dtype(piece))
        return [TensorOutput(name, dtype, shape, self._rows(piece, part, dtype)) for name in names]

    def _quantised_outputs(self, piece: Piece, part: Part, name: str, weights: WeightFormat) -> list[TensorOutput]:
        """The tensors of a weight. The first makes the rows of all, which the others hand out after it."""
        shape = piece.part_shape(part)
        source = self._reader.quantised(part)
        if source is not None and source.format == weights and not isinstance(weights, BlockFp8):
            return [_copied(name, stored, region) for stored, region in source.all_parts()]
        first, *others = weights.stored(shape)
        # In one piece each: a small allocation for each block, between large ones that are freed, fragments the heap.
        held: dict[str, bytearray] = {}

        def numbers(out: ScratchMemory, tally: Tally) -> Iterator[TensorSlice]:
            varying = [stored for stored in others if stored.constant is None]
            for stored in varying:
                held[stored.suffix] = bytearray(prod(stored.shape) * stored.dtype.itemsize)
            filled = dict.fromkeys(held, 0)
            for rows in self._rows(piece, part, None, weights.block_rows)(out, tally):
                values = rows.tensor()
                _refuse_nonfinite(values, part.name, weights, self._options.allow_nonfinite)
                made, *rest = weights.quantise(values)
                for stored, tensor in zip(varying, rest, strict=True):
                    data, start = TensorSlice.of(tensor).data, filled[stored.suffix]
                    filled[stored.suffix] += len(data)
                    held[stored.suffix][start : filled[stored.suffix]] = data
                yield TensorSlice.of(made)

        def following(stored: StoredTensor) -> Blocks:
            def blocks(*_: Any) -> Iterator[TensorSlice]:
                if stored.constant is not None:
                    yield TensorSlice(stored.dtype, stored.shape, memoryview(stored.constant))
                else:
                    yield TensorSlice(stored.dtype, stored.shape, memoryview(held.pop(stored.suffix)))

            return blocks

        return [
            TensorOutput(name + first.suffix, first.dtype, first.shape, numbers, name),
            *(TensorOutput(name + o.suffix, o.dtype, o.shape, following(o), name) for o in others),
        ]

    def _rows(self, piece: Piece, part: Part, dtype: Dtype | None, whole: int = 1) -> Blocks:
        """The rows of a part, a few at a time and `whole` together; without `dtype` in their stored format."""
        reader = self._reader
        row_bytes = prod(piece.shape[1:]) * reader.dtype(piece).itemsize
        step = max(1, BLOCK_BYTES // row_bytes // whole) * whole

        def blocks(out: ScratchMemory, tally: Tally) -> Iterator[TensorSlice]:
            for start in range(0, part.rows, step):
                stop = min(start + step, part.rows)
                rows = reader.part_rows(piece, part, start, stop, out.scratch((stop - start) * row_bytes))
                yield tally.add(part.name, rows if dtype is None else narrowed(rows, dtype, part.name))

        return blocks


def _copied(name: str, stored: StoredTensor, region: FileRegion | None) -> TensorOutput:
    """A tensor of a weight that is in the wanted format already: quantising it a second time would change it."""
    dtype = stored.dtype if region is None else region.dtype

    def blocks(_: ScratchMemory, tally: Tally) -> Iterator[TensorSlice]:
        if region is None:
            yield TensorSlice(dtype, stored.shape, memoryview(stored.constant or b""))
            return
        step = max(1, BLOCK_BYTES // max(1, region.row_bytes))
        for start in range(0, stored.shape[0], step):
            rows = region.row_range(start, min(start + step, stored.shape[0])).read()
            yield tally.add(name + stored.suffix, rows)

    return TensorOutput(name + stored.suffix, dtype, stored.shape, blocks, name)


def module_of(name: str) -> str:
    """The module of a weight."""
    return name.removesuffix(".weight")


def _refuse_nonfinite(values: Any, name: str, weights: WeightFormat, allowed: bool) -> None:
    """Raise CheckpointError where the format cannot hold numbers that are otherwise allowed."""
    if not allowed:  # the tally of the file refuses them, with a count
        return
    if values.isinf().any():  # by the rule of training it would become the largest number
        raise CheckpointError(f"{name} has infinities, and {_named(weights)} has none", "set convert.dtype=bf16")
    if not weights.nan and values.isnan().any():
        raise CheckpointError(f"{name} has NaN, and {_named(weights)} has none", "set convert.dtype=bf16")


def _named(weights: WeightFormat) -> str:
    return "FP8 (E4M3)" if weights.name == "fp8" else weights.name
