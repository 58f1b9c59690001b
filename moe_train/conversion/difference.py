"""Two checkpoints of any two formats, compared tensor by tensor, a few million numbers at a time.

Stored tensors are compared where both checkpoints have the same ones. Otherwise both are mapped to Hugging Face names:
quantised weights are dequantised, experts are compared per expert, and a copy is compared like its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import inf, prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.conversion import hf_config as config
from moe_train.conversion.hf_source import HuggingFace
from moe_train.conversion.inventory import is_hugging_face
from moe_train.conversion.mapping import Part, Piece, pieces, refuse_larger
from moe_train.conversion.plans import MegatronReader, is_model_tensor
from moe_train.formats import dcp, run_config, run_directory, safetensors
from moe_train.formats.dtypes import Dtype
from moe_train.formats.tensor_slices import FileRegion, TensorSlice
from parallel.errors import CheckpointError

_BLOCK_BYTES = 1 << 20  # of each side, at once, in each thread; measuring differences takes some forty times that
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read by rows."""

    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[int | None, int, int], TensorSlice]
    """(i, start, stop) -> rows of the i-th slice of the first axis; i is None where there are at most two axes."""

    def blocks(self) -> Iterator[tuple[int | None, int, int]]:
        """What to read, one after the other."""
        slices = range(self.shape[0]) if len(self.shape) > 2 else (None,)
        rows, *tail = (self.shape[1:] if len(self.shape) > 2 else self.shape) or (1,)
        step = max(1, _BLOCK_BYTES // max(1, prod(tail) * self.dtype.itemsize))
        for index in slices:
            for start in range(0, rows, step):
                yield index, start, min(start + step, rows)

    @property
    def text(self) -> str:
        """dtype and shape."""
        return f"{self.dtype} {list(self.shape)}"


Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both."""

    name: str
    what: str
    """`only in A`, `only in B`, `shape`, `dtype` (the numbers are equal) or `values`."""
    texts: tuple[str, str]
    """dtype and shape on each side; empty where it is not."""
    numbers: int = 0
    """How many of its numbers differ."""
    absolute: float = inf
    """Largest |a - b|; inf also where one of them is not a number."""
    relative: float = inf
    """Largest |a - b| / max(|a|, |b|)."""
    norm: float = inf
    """|A - B| / |A| of the whole tensor, in 2-norms."""
    within: bool = False
    """Whether tolerances that were given cover it."""


@dataclass(frozen=True)
class Tolerances:
    """How far numbers may be apart. Without any, tensors are equal bit by bit or differ."""

    absolute: float = 0.0
    relative: float = 0.0
    """A number passes with |a - b| <= absolute + relative x max(|a|, |b|)."""
    norm: float | None = None
    """A tensor passes with |A - B| <= norm x |A|; with one of the others too, it must pass both."""

    @property
    def given(self) -> bool:
        """Whether anything but equal bits passes."""
        return bool(self.absolute or self.relative or self.norm is not None)

    def cover(self, beyond: int, norm: float) -> bool:
        """Whether a tensor passes of which `beyond` numbers do not, and with this norm-relative difference."""
        passes = [norm <= self.norm] if self.norm is not None else []
        if self.absolute or self.relative or self.norm is None:
            passes.append(beyond == 0)
        return self.given and all(passes)


@dataclass(frozen=True)
class Comparison:
    """Everything that was found."""

    tensors: int
    """Of both together."""
    differences: list[Difference]
    """Worst first."""
    mapped: bool
    """Compared as Hugging Face tensors."""
    settings: dict[str, tuple[object, object]]
    """Settings of the models that change what the weights compute, by name, where they differ."""

    @property
    def passes(self) -> bool:
        """Whether both compute the same, as far as the tolerances ask."""
        return not self.settings and all(difference.within for difference in self.differences)


def compare(
    a: Path, b: Path, threads: int, progress: Callable[[int, int], None] = lambda *_: None,
    tolerances: Tolerances = Tolerances(), weights_only: bool = False,
) -> Comparison:  # fmt: skip
    """Compare the checkpoints at `a` and `b`, which `inventory.find` returned. `progress` gets (done, of) tensors.

    Args:
        weights_only: leave out optimizer state, random streams and scales of FP8 training.

    Raises:
        CheckpointError: one of them is damaged, or cannot be mapped to the format of the other.
    """
    models = _model(a), _model(b)
    mapped = _must_be_mapped(a, b, models)
    ours, theirs = (_mapped(p, m) if mapped else _raw(p) for p, m in zip((a, b), models, strict=True))
    if mapped:
        for model in filter(None, models):
            _add_copies(model, ours, theirs)
    names = sorted({*ours, *theirs})
    if weights_only:
        names = [name for name in names if is_model_tensor(name)]
    differences: list[Difference] = []
    with ThreadPoolExecutor(threads) as pool:
        futures = pool.map(lambda name: _compare(name, ours.get(name), theirs.get(name), tolerances), names)
        for done, difference in enumerate(futures, 1):
            differences += [] if difference is None else [difference]
            progress(done, len(names))
    differences.sort(key=lambda d: (d.within, -d.absolute, -d.numbers, d.name))
    settings = config.differences(models[0], models[1]) if models[0] and models[1] else {}
    return Comparison(len(names), differences, mapped, settings)


def _model(path: Path) -> ModelConfig | None:
    """The checkpoint's model; None for a Hugging Face family that is not one of ours."""
    if not is_hugging_face(path):
        run_directory.check_files(path)
        run_directory.read_state(path, oldest=1)
        return run_config.model_of(path)
    written = config.read(path)
    try:
        return config.to_model(written, path / config.FILE)
    except CheckpointError:
        return None


def _must_be_mapped(a: Path, b: Path, models: tuple[ModelConfig | None, ModelConfig | None]) -> bool:
    formats = [is_hugging_face(path) for path in (a, b)]
    if not any(formats):
        return False
    if not all(formats):
        return True
    if None in models:
        return False
    stored = [{n: (e.dtype, e.shape) for n, e in safetensors.open_directory(path).items()} for path in (a, b)]
    return stored[0] != stored[1]


def _raw(path: Path) -> Tensors:
    """The stored tensors, without a mapping to other names."""
    if is_hugging_face(path):
        return {name: _of_extent(extent) for name, extent in safetensors.open_directory(path).items()}
    checkpoint = dcp.Checkpoint(path)
    return {
        key: Stored(entry.properties.dtype, tuple(entry.size), partial(_megatron_rows, checkpoint, key))
        for key, entry in checkpoint.tensors.items()
    }


def _of_extent(extent: FileRegion) -> Stored:
    def read(index: int | None, start: int, stop: int) -> TensorSlice:
        if not extent.shape:
            return extent.read()
        return (extent if index is None else extent.index(index)).row_range(start, stop).read()

    return Stored(extent.dtype, extent.shape, read)


def _megatron_rows(checkpoint: dcp.Checkpoint, key: str, index: int | None, start: int, stop: int) -> TensorSlice:
    if not checkpoint.tensors[key].size:
        return checkpoint.chunks(key)[0].extent.read()
    return checkpoint.read(key, index, start, stop)


def _mapped(path: Path, model: ModelConfig | None) -> Tensors:
    """Tensors by their Hugging Face names, one for each expert, in a precision that can be computed with."""
    if model is None:
        model = config.to_model(config.read(path), path / config.FILE)  # says why it cannot be
    if not is_hugging_face(path):
        checkpoint = dcp.Checkpoint(path)
        refuse_larger(model, checkpoint.numbers, path / run_directory.CONFIG)
        all_pieces = pieces(model)
        reader = MegatronReader(checkpoint, all_pieces)
        return {part.name: _of_piece(reader, piece, part) for piece in all_pieces for part in piece.parts}
    source = HuggingFace(path)
    refuse_larger(model, source.numbers, path / config.FILE)
    tensors = {name: _of_source(source, name) for name in source.names}
    used: set[str] = set()
    for piece in pieces(model):
        for part in piece.parts:
            if part.other in tensors and part.name not in tensors:
                tensors[part.name] = tensors.pop(part.other)
            name = _fused_name(source, piece, part)
            if name is not None and part.fused is not None:
                expert = source.extents[name].index(part.fused.expert)
                first = part.fused.part * part.rows
                tensors[part.name] = _of_extent(expert.row_range(first, first + part.rows))
                used.add(name)
    return {name: stored for name, stored in tensors.items() if name not in used}


def _of_piece(reader: MegatronReader, piece: Piece, part: Part) -> Stored:
    def read(_: int | None, start: int, stop: int) -> TensorSlice:
        return reader.part_rows(piece, part, start, stop)

    return Stored(reader.dtype(piece), piece.part_shape(part), read)


def _of_source(source: HuggingFace, name: str) -> Stored:
    if name not in source.quantised:
        return _of_extent(source.extents[name])
    return Stored(source.dtype(name), source.shapes[name], lambda _, start, stop: source.read(name, start, stop))


def _fused_name(source: HuggingFace, piece: Piece, part: Part) -> str | None:
    """The tensor of all experts that holds the part, where that has the shape that it should."""
    if part.fused is None or part.name in source.shapes:
        return None
    shape = (piece.count, part.rows * part.fused.parts, *piece.shape[1:])
    names = (part.fused.name, part.fused.name + ".weight")
    return next((n for n in names if n in source.extents and source.extents[n].shape == shape), None)


def _add_copies(model: ModelConfig, a: Tensors, b: Tensors) -> None:
    """Where only one side has a copy of a tensor, compare it with the other side's original."""
    for piece in pieces(model):
        for part in piece.parts:
            for copy in part.copies:
                for first, second in ((a, b), (b, a)):
                    if copy in first and copy not in second and part.name in second:
                        second[copy] = second[part.name]


def _compare(name: str, a: Stored | None, b: Stored | None, tolerances: Tolerances) -> Difference | None:
    if a is None or b is None:
        return Difference(name, "only in B" if a is None else "only in A", (a.text if a else "", b.text if b else ""))
    texts = a.text, b.text
    if a.shape != b.shape:
        return Difference(name, "shape", texts)
    total, equal = _Measured(), []
    for block in a.blocks():
        x, y = a.read(*block).tensor(), b.read(*block).tensor()
        if a.dtype != b.dtype or not torch.equal(_bytes(x), _bytes(y)):
            total += _measure(x, y, tolerances)
        else:
            equal.append(block)
    if total.numbers:
        for block in equal:  # again: tensors are nearly always equal as a whole
            total += _Measured(square=_square(a.read(*block).tensor().double()))
        norm = total.norm
        within = tolerances.cover(total.beyond, norm)
        return Difference(name, "values", texts, total.numbers, total.absolute, total.relative, norm, within)
    return None if a.dtype == b.dtype else Difference(name, "dtype", texts, 0, 0.0, 0.0, 0.0, tolerances.given)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class _Measured:
    """Differences of a part of a tensor."""

    numbers: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    beyond: int = 0
    """Numbers that are further apart than the tolerances allow."""
    square_of_gap: float = 0.0
    square: float = 0.0

    def __add__(self, other: _Measured) -> _Measured:
        return _Measured(
            self.numbers + other.numbers, max(self.absolute, other.absolute), max(self.relative, other.relative),
            self.beyond + other.beyond, self.square_of_gap + other.square_of_gap, self.square + other.square,
        )  # fmt: skip

    @property
    def norm(self) -> float:
        """Of the difference, over that of the first tensor."""
        if not self.square_of_gap:
            return 0.0
        return sqrt(self.square_of_gap / self.square) if 0 < self.square < inf else inf


def _square(numbers: Tensor) -> float:
    return float(numbers.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum())


def _measure(x: Tensor, y: Tensor, tolerances: Tolerances) -> _Measured:
    """How many numbers differ, and by how much.

    Numbers of one dtype differ where their bits do: 0 and -0 count, with a difference of 0. Across dtypes their values
    are compared.
    """
    u, v = x.reshape(-1).double(), y.reshape(-1).double()
    square = _square(u)
    if x.dtype == y.dtype:
        bits = _BITS[x.dtype.itemsize]
        differ = _bytes(x).view(bits) != _bytes(y).view(bits)
    else:
        differ = (u != v) & ~(u.isnan() & v.isnan())
    u, v = u[differ], v[differ]
    if not len(u):
        return _Measured(square=square)
    same = (u == v) | (u.isnan() & v.isnan())
    gap = torch.where(same, 0.0, (u - v).abs().nan_to_num(nan=inf, posinf=inf))
    size = torch.maximum(u.abs(), v.abs())
    share = torch.where(gap == 0, 0.0, torch.where(gap.isinf(), inf, gap / size))
    allowed = tolerances.absolute + tolerances.relative * size
    beyond = int(((gap > allowed) | gap.isinf()).sum())
    return _Measured(len(u), float(gap.max()), float(share.max()), beyond, float(gap.square().sum()), square)
