"""An export in Hugging Face format compared with the checkpoint that it was made of.

Every tensor is made from the source a second time, a block at a time, and compared bit by bit: quantising is
deterministic. A finding says how a tensor differs: it is missing, has another shape or dtype, the numbers of another
tensor, another packing order, another zero point or other scales; or which key of config.json has another value.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.model import ModelConfig
from moe_train.conversion import hf_config as config
from moe_train.conversion.hf import quantization
from moe_train.conversion.hf_outputs import (
    KEPT,
    PLAIN,
    ConvertOptions,
    Export,
    Reader,
    TensorOutput,
    group_bytes,
    module_of,
)
from moe_train.conversion.mapping import Piece
from moe_train.conversion.small_files import SmallFiles
from moe_train.formats import safetensors
from moe_train.formats.dtypes import DTYPES
from moe_train.formats.nonfinite import Tally
from moe_train.formats.tensor_slices import FileRegion
from moe_train.formats.weight_formats import PACKED, BlockFp8, PackedInt, WeightFormat
from parallel.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

CONFIG = config.FILE
_BYTE = DTYPES["uint8"]


@dataclass(frozen=True)
class Discrepancy:
    """Something of an export that is not what its source exports to."""

    name: str
    """A tensor, or a file."""
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass
class Discrepancies:
    """What one process found in its share."""

    wrong: dict[str, str] = field(default_factory=dict)
    """Tensor -> how it differs."""
    expected: dict[int, str] = field(default_factory=dict)
    """Checksum of what a tensor should have -> its name."""
    stored: dict[str, int] = field(default_factory=dict)
    """Wrong tensor -> checksum of what it has."""

    def merge(self, other: Discrepancies) -> None:
        """Add those of another share."""
        self.wrong |= other.wrong
        self.expected |= other.expected
        self.stored |= other.stored

    def listed(self) -> list[Discrepancy]:
        """All of them; a tensor with the numbers of another one says of which."""
        result = []
        for name, what in sorted(self.wrong.items()):
            other = self.expected.get(self.stored.get(name, -1))
            result.append(Discrepancy(name, what if other in (None, name) else f"has the numbers of {other}"))
        return result


def refuse_other_formats(source: Path, target: Path) -> None:
    """Raise CheckpointError where the target is not a Hugging Face directory."""
    if not target.is_dir():
        raise CheckpointError(f"convert.target={target} is not a directory", "name an export that exists")
    if not (target / CONFIG).is_file():
        raise CheckpointError(
            f"{target} has no {CONFIG}, and verify compares exports in Hugging Face format",
            f"use moe-inspect --diff {source} {target}",
        )


def options_of(target: Path, given: ConvertOptions, all_pieces: Sequence[Piece], reader: Reader) -> ConvertOptions:
    """The options with which `target` was exported, as its config.json declares them; `given` ones win.

    Raises:
        CheckpointError: the target has no config.json, or declares a format that is not written here.
    """
    written = config.read(target)
    declared = quantization.of_config(written, target / CONFIG)
    if given.dtype is not None:
        return given
    if declared is None:
        plain = replace(given, dtype=None, group_size=None, keep=KEPT)
        natural = {reader.dtype(piece) for piece in all_pieces if len(piece.shape) == 2}
        stored = {extent.dtype for extent in safetensors.open_directory(target).values() if len(extent.shape) == 2}
        names = [name for name, dtype in PLAIN.items() if stored == {dtype}]
        return plain if stored == natural or not names else replace(plain, dtype=names[0])
    modules = {module_of(part.name) for piece in all_pieces for part in piece.parts if len(piece.shape) == 2}
    kept = [name for name in quantization.kept_of(written) if name in modules]
    group_size = declared.group_size if isinstance(declared, PackedInt) else None
    keep = tuple(kept) if kept or not isinstance(declared, BlockFp8) else KEPT
    return replace(given, dtype=declared.name, group_size=group_size, keep=keep)


def config_findings(export: Export, model: ModelConfig, small: SmallFiles, target: Path) -> list[Discrepancy]:
    """Keys of config.json that are not those of the export."""
    expected = _flat(json.loads(json.dumps(export.config(model, small))))
    found = _flat(config.read(target))
    result = []
    for key in [*expected, *(key for key in found if key not in expected)]:
        has, wants = (json.dumps(side[key])[:80] if key in side else "absent" for side in (found, expected))
        if has != wants:
            result.append(Discrepancy(CONFIG, f"{key} is {has}, and the export has {wants}"))
    return result


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects by dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def compare(
    export: Export, reader: Reader, target: Path, threads: int, progress: Callable[[int], None] = lambda _: None,
    rank: int = 0, size: int = 1,
) -> Discrepancies:  # fmt: skip
    """Compare the tensors of `target`; of `size` processes each its share. `progress` gets bytes.

    Raises:
        CheckpointError: a file is damaged, or the index names another one than holds a tensor.
    """
    extents = safetensors.open_directory(target)
    findings = Discrepancies()
    if rank == 0:
        expected = {output.name for group in export.groups for output in group}
        findings.wrong |= {n: "belongs to no tensor of the export" for n in extents if n not in expected}

    def one(group: list[TensorOutput]) -> Discrepancies:
        found = _compare_group(export.format, group, extents)
        reader.settle()
        progress(group_bytes(group))
        return found

    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(one, export.groups[rank::size]):
            findings.merge(found)
    return findings


def _compare_group(
    weights: WeightFormat | None, group: Sequence[TensorOutput], extents: dict[str, FileRegion]
) -> Discrepancies:
    findings = Discrepancies()
    memory, tally = _Memory(), Tally()
    for output in group:
        region = extents.get(output.name)
        problem = _problem(output, region)
        if problem is not None:
            findings.wrong[output.name] = problem
        comparison = _Comparison(weights, output, None if problem is not None else region)
        for block in output.blocks(memory, tally):  # also without a tensor to compare: scales follow from the numbers
            comparison.add(block.data)
        findings.expected[comparison.wanted] = output.name
        if comparison.numbers:
            findings.wrong[output.name] = comparison.text()
            findings.stored[output.name] = comparison.stored
    return findings


class _Memory:
    """Memory for the blocks of one thread."""

    def __init__(self) -> None:
        self._held = bytearray()

    def scratch(self, size: int) -> memoryview:
        """`size` bytes, the same for each block."""
        if len(self._held) < size:
            self._held = bytearray(size)
        return memoryview(self._held)[:size]


def _problem(output: TensorOutput, region: FileRegion | None) -> str | None:
    if region is None:
        return "is missing"
    if (region.dtype, region.shape) != (output.dtype, output.shape):
        return f"is {region.dtype} {list(region.shape)}, and the export has {output.dtype} {list(output.shape)}"
    return None


class _Comparison:
    """A stored tensor and the one that it should be, block by block."""

    def __init__(self, weights: WeightFormat | None, output: TensorOutput, region: FileRegion | None) -> None:
        self._output, self._region = output, region
        self._position = 0
        self.numbers = 0
        """Numbers that differ."""
        self._total = 0
        self.wanted, self.stored = 0, 0
        """Checksums of what it should have and of what it has."""
        self._explanations = _explanations(weights, output)

    def add(self, wanted: memoryview) -> None:
        """Compare the next bytes."""
        self.wanted = zlib.crc32(wanted, self.wanted)
        start, self._position = self._position, self._position + len(wanted)
        if self._region is None:
            return
        flat = FileRegion(self._region.path, self._region.offset + start, _BYTE, (len(wanted),))
        stored = flat.read().data
        self.stored = zlib.crc32(stored, self.stored)
        if bytes(stored) != bytes(wanted):
            self._count(wanted, stored)

    def _count(self, wanted: memoryview, stored: memoryview) -> None:
        import numpy as np

        ours, theirs = np.frombuffer(wanted, np.uint8), np.frombuffer(stored, np.uint8)
        width = self._output.dtype.itemsize
        self.numbers += int((ours.reshape(-1, width) != theirs.reshape(-1, width)).any(axis=1).sum())
        self._explanations = {
            text: change for text, change in self._explanations.items() if np.array_equal(change(ours), theirs)
        }

    def text(self) -> str:
        """How the tensor differs."""
        for text in self._explanations:
            return text
        total = max(1, self._output.bytes // self._output.dtype.itemsize)
        kind = "scales" if "scale" in self._output.name.rpartition(".")[2] else "numbers"
        if self._output.name.endswith(PACKED):
            kind = "packed words" if self._output.dtype.itemsize > 1 else "packed bytes"
        return f"{self.numbers:,} of {total:,} {kind} differ"


def _explanations(weights: WeightFormat | None, output: TensorOutput) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Ways in which writers of packed numbers err, each with what it makes of the right bytes."""
    if weights is None or not output.name.endswith(PACKED):
        return {}
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    narrow = not isinstance(weights, PackedInt) or weights.width == 4
    if narrow:
        changes["the two numbers of each byte are in reverse order"] = lambda data: data << 4 | data >> 4
    if isinstance(weights, PackedInt):
        word = output.dtype.itemsize
        sign = 0x88 if narrow else 0x80
        zero = 2 ** (weights.width - 1)
        changes[f"codes have a zero point of 0, and the export has one of {zero}"] = lambda data: data ^ sign
        changes["the bytes of each packed word are in reverse order"] = lambda data: data.reshape(-1, word)[
            :, ::-1
        ].reshape(-1)
    return changes


def refuse(findings: Sequence[Discrepancy], source: Path, target: Path) -> None:
    """Raise CheckpointError where something was found."""
    if not findings:
        return
    more = f", and {len(findings) - 1:,} more" if len(findings) > 1 else ""
    raise CheckpointError(
        f"{target} is not what {source} exports to: {findings[0]}{more}",
        "export it again with moe-convert, or give the options of the export, such as convert.dtype=",
    )
