"""Plans of conversions: which files a checkpoint in another format has, and how each of them is written.

A file is a list of tensors that are read, converted and written one after the other, a few million numbers at a time:
memory is bounded by the number of files that are written at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config
from moe_train.conversion import hf_config as config
from moe_train.conversion.hf_outputs import (
    PLAIN,
    ConvertOptions,
    Export,
    Reader,
    TensorOutput,
    group_bytes,
    wanted,
)
from moe_train.conversion.hf_source import HuggingFace, MappedSource, narrowed
from moe_train.conversion.mapping import Part, Piece
from moe_train.conversion.quantised_weights import QuantisedWeight
from moe_train.conversion.small_files import KEPT, SmallFiles, accompanying
from moe_train.formats import dcp, run_config, safetensors
from moe_train.formats.dcp_metadata import EMA_PREFIX
from moe_train.formats.directory_writer import FileJob, WritePlan
from moe_train.formats.dtypes import DTYPES, Dtype
from moe_train.formats.hashing_file import HashingFile
from moe_train.formats.nonfinite import Tally
from moe_train.formats.run_directory import CONFIG, FORMAT, METADATA, STATE, read_state
from moe_train.formats.tensor_slices import BLOCK_BYTES, TensorSlice
from parallel.errors import CheckpointError

ALLOW = "set convert.allow_nonfinite=true to convert them unchanged"

_CHUNK_BYTES = 128 << 20  # largest item of a .distcp file, which a loader takes whole
_LARGEST_FILE_BYTES, _SMALLEST_FILE_BYTES, _FILES = 4 << 30, 16 << 20, 32


class MegatronReader:
    """A Megatron checkpoint read as Hugging Face tensors.

    Args:
        fp32: read the fp32 weights of the optimizer where the checkpoint has them.
        ema: read the EMA of the weights.

    Raises:
        CheckpointError: a tensor of the model is missing, has another shape, or belongs to no part of the model; or
            there is no EMA.
    """

    def __init__(
        self, checkpoint: dcp.Checkpoint, all_pieces: Sequence[Piece], fp32: bool = False, ema: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self._masters, self._ema = fp32, ema
        if ema:
            check_average(checkpoint)
        check_megatron(checkpoint, all_pieces)

    def dtype(self, piece: Piece) -> Dtype:
        dtype: Dtype = self.checkpoint.tensors[self.key(piece)].properties.dtype
        return dtype

    def key(self, piece: Piece) -> str:
        """The tensor of the checkpoint that a piece is read from."""
        return stored_key(self.checkpoint, piece.key, self._masters, self._ema)

    def quantised(self, _: Part) -> None:
        """No weight of a Megatron checkpoint is."""

    def has(self, name: str) -> bool:
        return name != "lm_head.weight"  # a tied head: transformers leaves it out

    def part_rows(self, piece: Piece, part: Part, start: int, stop: int, out: memoryview | None = None) -> TensorSlice:
        rows, row = TensorSlice.empty(self.dtype(piece), (stop - start, *piece.shape[1:]), out), 0
        for first, last in part.blocks:
            begin, end = max(row, start), min(row + last - first, stop)
            if begin < end:
                target = rows.range(begin - start, end - start).data
                self.checkpoint.read(self.key(piece), piece.index, first + begin - row, first + end - row, target)
            row += last - first
        return rows

    def settle(self) -> None:
        if self.checkpoint.checks:
            self.checkpoint.checks.settle()


def check_megatron(checkpoint: dcp.Checkpoint, all_pieces: Sequence[Piece]) -> None:
    """Raise CheckpointError where the checkpoint and the model differ in a name or a shape."""
    remedy = "name the model it was trained with: model=NAME, or restore its config.yaml"
    expected = {piece.key: piece.global_shape for piece in all_pieces}
    for key, shape in expected.items():
        entry = checkpoint.tensors.get(key)
        if entry is None:
            raise CheckpointError(f"checkpoint {checkpoint.directory} has no tensor {key}", remedy)
        if tuple(entry.size) != shape:
            stored_shape = list(entry.size)
            raise CheckpointError(
                f"{key} has shape {stored_shape} in checkpoint {checkpoint.directory} and {list(shape)} in the model",
                remedy,
            )
    for key in checkpoint.tensors:
        if is_model_tensor(key) and key not in expected:
            raise CheckpointError(
                f"checkpoint {checkpoint.directory} has a tensor {key}, which the model does not have", remedy
            )


def stored_key(checkpoint: dcp.Checkpoint, key: str, fp32: bool, ema: bool) -> str:
    """The tensor of the checkpoint that a weight is read from: its EMA, its fp32 weights, or itself."""
    if ema:
        return checkpoint.average(key)
    return checkpoint.master(key) if fp32 else key


def check_average(checkpoint: dcp.Checkpoint) -> None:
    """Raise CheckpointError where the checkpoint has no EMA of the weights."""
    if not any(key.startswith(EMA_PREFIX) for key in checkpoint.tensors):
        raise CheckpointError(
            f"convert.ema=true, but checkpoint {checkpoint.directory} has no EMA of the weights",
            "leave convert.ema out, or train with optimizer.ema_decay",
        )


def is_model_tensor(key: str) -> bool:
    """Whether a tensor of a Megatron checkpoint is a weight or buffer of the model."""
    return not key.startswith(("optimizer.", EMA_PREFIX, "rng.", "fp8_scales."))


class HuggingFaceReader:
    """A Hugging Face checkpoint read as Hugging Face tensors."""

    def __init__(self, source: MappedSource) -> None:
        self._source = source

    def dtype(self, piece: Piece) -> Dtype:
        return self._source.dtype(piece)

    def quantised(self, part: Part) -> QuantisedWeight | None:
        return self._source.quantised(part)

    def has(self, name: str) -> bool:
        return name in self._source.source.shapes

    def part_rows(self, piece: Piece, part: Part, start: int, stop: int, out: memoryview | None = None) -> TensorSlice:
        return self._source.part_rows(piece, part, start, stop, out)

    def settle(self) -> None:
        """Its files have no checksum but that of the whole."""


def to_megatron(source: MappedSource, target: Path, options: ConvertOptions) -> WritePlan:
    """Hugging Face -> Megatron: weights for `init_from`, which any layout of ranks reads.

    The checkpoint has a config of a run with that model, and the defaults elsewhere. It has nothing of where and how it
    was converted, so that the same weights make the same bytes.

    Raises:
        ConfigError: the format cannot hold what is asked for.
    """
    options.refuse_quantised()
    chunks = [chunk for piece in source.pieces for chunk in _chunks(piece, wanted(options, piece, source.dtype(piece)))]
    files = _pack(chunks, lambda chunk: chunk.bytes, options.file_bytes)
    tallies = _Tallies(options)
    jobs = [
        FileJob(f"__{i}_0.distcp", sum(c.bytes for c in file), partial(_write_chunks, source, file, tallies))
        for i, file in enumerate(files)
    ]
    converted_config = Config(model=source.model)

    def finish(facts: dict[str, Any]) -> dict[str, bytes]:
        state = {
            "format": FORMAT,
            "weights_only": True,
            "progress": {"step": 0, "consumed_samples": 0, "consumed_tokens": 0},
        }
        return {
            METADATA: dcp.table(_items(facts)),
            CONFIG: run_config.dump(converted_config).encode(),
            STATE: json.dumps(state, indent=1).encode(),
            **upstream_files(),
        }

    directory = source.source.directory
    small_files = {f"{KEPT}/{path.name}": path for path in accompanying(directory)}
    used = {extent.path for extent in source.source.extents.values()}
    identity = {"format": "megatron", **_identity(directory, used, options, source.model, jobs)}
    return WritePlan(target, identity, jobs, finish, small_files, tallies.notes)


class _Tallies:
    """What becomes of numbers that are not finite."""

    def __init__(self, options: ConvertOptions) -> None:
        self.allowed = options.allow_nonfinite
        self.notes: list[str] = []
        """What was written in spite of them, a line for each file."""

    def settle(self, tally: Tally) -> None:
        """Raise CheckpointError where a file got such numbers and must not have them."""
        if not self.allowed:
            tally.refuse("the weights are not all finite", ALLOW)
        elif tally.found:
            self.notes.append(str(tally))


@dataclass(frozen=True)
class _Chunk:
    """Rows of a piece that become one item."""

    piece: Piece
    start: int
    stop: int
    dtype: Dtype

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * prod(self.piece.shape[1:]) * self.dtype.itemsize


def _chunks(piece: Piece, dtype: Dtype) -> Iterator[_Chunk]:
    step = max(1, _CHUNK_BYTES // (prod(piece.shape[1:]) * dtype.itemsize))
    for start in range(0, piece.rows, step):
        yield _Chunk(piece, start, min(start + step, piece.rows), dtype)


def _write_chunks(source: MappedSource, chunks: list[_Chunk], tallies: _Tallies, out: HashingFile) -> list[list[Any]]:
    """Writes one item for each chunk; returns what `_items` needs."""
    facts: list[list[Any]] = []
    tally = Tally()
    for chunk in chunks:
        piece = chunk.piece
        lead, tail = ((), ()) if piece.index is None else ((piece.index,), (1,))
        offsets = (*lead, chunk.start, *[0] * (len(piece.shape) - 1))
        shape = (*tail, chunk.stop - chunk.start, *piece.shape[1:])
        row_bytes = prod(piece.shape[1:]) * chunk.dtype.itemsize
        rows: Iterator[TensorSlice] = (
            source.read(piece, first, last, chunk.dtype, out.scratch((last - first) * row_bytes))
            for first, last in _blocks(chunk, chunk.bytes)
        )
        rows = tally.checked(piece.key, rows)
        facts.append(_save(out, chunk.dtype, shape, rows, piece.key, piece.global_shape, offsets))
    tallies.settle(tally)
    return facts


def _blocks(rows: _Chunk | _Box, size: int) -> Iterator[tuple[int, int]]:
    """The rows of something of `size` bytes, a few at a time."""
    step = max(1, BLOCK_BYTES * (rows.stop - rows.start) // max(1, size))
    for start in range(rows.start, rows.stop, step):
        yield start, min(start + step, rows.stop)


def _save(
    out: HashingFile, dtype: Dtype, shape: Sequence[int], blocks: Iterator[TensorSlice], key: str,
    global_shape: Sequence[int], offsets: Sequence[int],
) -> list[Any]:  # fmt: skip
    start = out.position
    dcp.write_item(out, dtype, tuple(shape), blocks)
    return [key, list(global_shape), dtype.name, list(offsets), list(shape), start, out.position - start]


def _items(facts: dict[str, Any]) -> Iterator[dcp.Item]:
    for file, items in facts.items():
        for key, global_shape, dtype, offsets, sizes, start, length in items:
            yield dcp.Item(key, tuple(global_shape), DTYPES[dtype], tuple(offsets), tuple(sizes), file, start, length)


def upstream_files() -> dict[str, bytes]:
    """What Megatron-Core's own loader needs besides the tensors (dist_checkpointing/core.py, strategies/common.py)."""
    kinds = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    return {"metadata.json": json.dumps(kinds).encode(), "common.pt": dcp.EMPTY}


def copy_megatron(checkpoint: dcp.Checkpoint, target: Path, options: ConvertOptions) -> WritePlan:
    """Megatron -> Megatron: the same state in another precision of the weights, in files of another size, without the
    optimizer, or the EMA of the weights. Nothing is done for another layout: a checkpoint has none.

    Raises:
        ConfigError: the format cannot hold what is asked for.
    """
    options.refuse_quantised()
    if options.ema:
        check_average(checkpoint)
    whole = options.optimizer and not options.ema  # the optimizer's state is that of the weights
    keys = [key for key in checkpoint.tensors if whole or is_model_tensor(key)]
    # The most precise weights that there are, as MegatronReader reads them.
    stored = {key: stored_key(checkpoint, key, options.dtype == "fp32", options.ema) for key in keys}
    boxes = [box for key in keys for chunk in checkpoint.chunks(stored[key]) for box in _boxes(key, chunk)]
    files = _pack(boxes, lambda box: box.bytes, options.file_bytes)
    tallies = _Tallies(options)

    def write(file: list[_Box], out: HashingFile) -> list[list[Any]]:
        facts, tally = [], Tally()
        for box in file:
            extent, dtype = box.chunk.extent, box.chunk.extent.dtype
            if options.dtype and is_model_tensor(box.key) and not box.key.endswith("expert_bias"):
                dtype = PLAIN[options.dtype]
            parts = (extent.row_range(first, last) for first, last in _blocks(box, box.bytes))
            rows: Iterator[TensorSlice] = (
                narrowed(checkpoint.read_part(box.chunk, part, out.scratch(part.bytes)), dtype, box.key)
                for part in parts
            )
            shape = (box.stop - box.start, *extent.shape[1:])
            offsets = [box.chunk.offsets[0] + box.start, *box.chunk.offsets[1:]]
            rows = tally.checked(box.key, rows)
            facts.append(_save(out, dtype, shape, rows, box.key, checkpoint.tensors[box.key].size, offsets))
        if checkpoint.checks:
            checkpoint.checks.settle()
        tallies.settle(tally)
        return facts

    jobs = [
        FileJob(f"__{i}_0.distcp", sum(b.bytes for b in file), partial(write, file)) for i, file in enumerate(files)
    ]
    directory = checkpoint.directory
    state = read_state(directory) | ({} if whole else {"weights_only": True})

    def finish(facts: dict[str, Any]) -> dict[str, bytes]:
        small = {METADATA: dcp.table(_items(facts)), STATE: json.dumps(state, indent=1).encode(), **upstream_files()}
        return small | {CONFIG: (directory / CONFIG).read_bytes()}

    small_files = {f"{KEPT}/{path.name}": path for path in accompanying(directory / KEPT)}
    identity = {"format": "megatron", **_identity(directory, checkpoint.files, options, None, jobs)}
    return WritePlan(target, identity, jobs, finish, small_files, tallies.notes)


@dataclass(frozen=True)
class _Box:
    """Rows of a stored chunk."""

    key: str
    chunk: dcp.Chunk
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.chunk.extent.row_range(self.start, self.stop).bytes


def _boxes(key: str, chunk: dcp.Chunk) -> Iterator[_Box]:
    rows = chunk.sizes[0]
    step = max(1, _CHUNK_BYTES // max(1, chunk.extent.row_bytes))
    for start in range(0, rows, step):
        yield _Box(key, chunk, start, min(start + step, rows))


def to_hf(
    reader: Reader, all_pieces: Sequence[Piece], model: ModelConfig, target: Path, options: ConvertOptions,
    origin: Path, files: Iterable[Path], small: SmallFiles,
) -> WritePlan:  # fmt: skip
    """Anything -> Hugging Face.

    Args:
        origin: directory that `reader` reads.
        files: those of it that hold tensors.
        small: what else the directory gets, such as the tokenizer.
    """
    export = Export(reader, all_pieces, options)
    packed = _pack(export.groups, group_bytes, options.file_bytes)
    names = [f"model-{i:05d}-of-{len(packed):05d}.safetensors" for i in range(1, len(packed) + 1)]
    tallies = _Tallies(options)
    outputs = {name: [o for group in file for o in group] for name, file in zip(names, packed, strict=True)}
    jobs = [
        FileJob(name, sum(o.bytes for o in tensors), partial(_write_outputs, reader, tensors, tallies))
        for name, tensors in outputs.items()
    ]
    written = export.config(model, small)

    def finish(_: dict[str, Any]) -> dict[str, bytes]:
        weight_map = {o.name: name for name, tensors in outputs.items() for o in tensors}
        index = {"metadata": {"total_size": sum(job.bytes for job in jobs)}, "weight_map": weight_map}
        return {
            safetensors.INDEX: json.dumps(index, indent=1).encode(),
            config.FILE: (json.dumps(written, indent=2) + "\n").encode(),
            **small.made,
        }

    identity = {"format": "hf", **_identity(origin, files, options, model, jobs)}
    return WritePlan(target, identity, jobs, finish, small.copied, tallies.notes, export.remarks())


def _write_outputs(reader: Reader, outputs: list[TensorOutput], tallies: _Tallies, out: HashingFile) -> None:
    tally = Tally()
    out.write(safetensors.header([(o.name, o.dtype, o.shape) for o in outputs]))
    for output in outputs:
        for block in output.blocks(out, tally):
            out.write(block.data)
    reader.settle()
    tallies.settle(tally)


def _pack(things: Sequence[Any], size_of: Callable[[Any], int], wanted: int | None) -> list[list[Any]]:
    """Consecutive `things` in files of about the wanted size. The same for any number of processes and threads."""
    total = sum(map(size_of, things))
    limit = wanted or min(max(total // _FILES, _SMALLEST_FILE_BYTES), _LARGEST_FILE_BYTES)
    files: list[list[Any]] = [[]]
    file_bytes = 0
    for thing in things:
        size = size_of(thing)
        if files[-1] and file_bytes + size > limit:
            files.append([])
            file_bytes = 0
        files[-1].append(thing)
        file_bytes += size
    return files


def _identity(
    directory: Path, files: Iterable[Path], options: ConvertOptions, model: ModelConfig | None, jobs: Iterable[FileJob]
) -> dict[str, Any]:
    """What decides the bytes of the result: the source's files, every option, and which tensors each file gets."""
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(set(files))}
    return {
        "source": str(directory.resolve()),
        "files": stats,
        "options": {name: value for name, value in asdict(options).items() if name != "allow_nonfinite"},
        "model": None if model is None else asdict(model),
        "written": {job.name: job.bytes for job in jobs},
    }


__all__ = ["ConvertOptions", "HuggingFace", "MappedSource", "MegatronReader", "copy_megatron", "to_hf", "to_megatron"]
