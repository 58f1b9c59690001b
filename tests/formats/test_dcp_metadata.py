"""The table of contents against the files that it names, at the boundaries."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as of_torch

from moe_train.formats import dcp_metadata
from moe_train.formats.dcp_metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    Size,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from moe_train.formats.dtypes import DTYPES
from parallel.errors import CheckpointError

NAME = "decoder.weight"
FIRST, SECOND = MetadataIndex(NAME, Size((0, 0))), MetadataIndex(NAME, Size((2, 0)))


def table() -> Metadata:
    """A tensor of (4, 3) bf16 numbers in two parts of 12 bytes, both at the end of a file of 40 bytes."""
    chunks = [ChunkStorageMetadata(Size((row, 0)), Size((2, 3))) for row in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(DTYPES["bfloat16"]), Size((4, 3)), chunks)
    places = {FIRST: StorageInfo("__0_0.distcp", 28, 12), SECOND: StorageInfo("__0_0.distcp", 16, 12)}
    return Metadata({NAME: entry}, places)


def write(directory: Path, contents: Metadata, size: int = 40) -> Path:
    (directory / "__0_0.distcp").write_bytes(bytes(size))
    (directory / ".metadata").write_bytes(dcp_metadata.dump(contents))
    return directory


def test_parts_that_just_fit_are_read(tmp_path: Path) -> None:
    assert dcp_metadata.read(write(tmp_path, table())) == table()


def test_a_part_without_numbers_needs_no_byte(tmp_path: Path) -> None:
    chunk_of_none = ChunkStorageMetadata(Size((0, 0)), Size((0, 3)))
    entry = TensorStorageMetadata(TensorProperties(DTYPES["bfloat16"]), Size((0, 3)), [chunk_of_none])
    contents = Metadata({NAME: entry}, {FIRST: StorageInfo("__0_0.distcp", 0, 0)})
    assert dcp_metadata.read(write(tmp_path, contents, size=0)) == contents


def test_torch_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    """With the fields that a table of contents need not have."""
    read = pickle.loads(dcp_metadata.dump(table()))
    properties = of_torch.TensorProperties(dtype=torch.bfloat16)
    assert isinstance(read, of_torch.Metadata)
    entry = read.state_dict_metadata[NAME]
    assert isinstance(entry, of_torch.TensorStorageMetadata)
    assert (entry.properties, entry.size) == (properties, torch.Size((4, 3)))
    index = of_torch.MetadataIndex(NAME, torch.Size((2, 0)))
    assert (read.storage_data[index].offset, read.storage_data[index].length) == (16, 12)
    read.planner_data = OrderedDict(fields=defaultdict(list, {"names": [NAME]}))
    read.storage_meta = of_torch.StorageMeta(checkpoint_id=tmp_path)
    read.state_dict_metadata["extra_state"] = of_torch.BytesStorageMetadata()
    write(tmp_path, table())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(read, protocol=2))
    found = dcp_metadata.read(tmp_path)
    assert isinstance(found.state_dict_metadata.pop("extra_state"), dcp_metadata.Other)
    assert found == table()


def entry_of(contents: Metadata) -> TensorStorageMetadata:
    entry = contents.state_dict_metadata[NAME]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def place(**changes: Any) -> Callable[[Metadata], None]:
    def change(contents: Metadata) -> None:
        contents.storage_data[FIRST] = replace(contents.storage_data[FIRST], **changes)

    return change


def chunk(**changes: Any) -> Callable[[Metadata], None]:
    def change(contents: Metadata) -> None:
        chunks = entry_of(contents).chunks
        chunks[1] = replace(chunks[1], **changes)

    return change


def lose(contents: Metadata) -> None:
    del contents.storage_data[SECOND]


WRONG: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "an item one byte short": (place(length=11), "at (0, 0) does not fit into its item"),
    "a file one byte short": (place(offset=29), "__0_0.distcp has 40 bytes of at least 41"),
    "a length that ends after the file": (place(length=13), "__0_0.distcp has 40 bytes of at least 41"),
    "a part one row too far": (chunk(sizes=Size((3, 3))), "at (2, 0) is not inside (4, 3)"),
    "a part one column too far": (chunk(sizes=Size((2, 4))), "at (2, 0) is not inside (4, 3)"),
    "a part with another offset": (chunk(offsets=Size((1, 0))), "at (1, 0) is in no file"),
    "a part without a place": (lose, "at (2, 0) is in no file"),
    "a part of fewer axes": (chunk(sizes=Size((2,))), "is not a table of contents"),
    "sizes that are a tuple": (chunk(sizes=(2, 3)), f"a part of {NAME} has no shape"),
    "offsets that are a tuple": (chunk(offsets=(2, 0)), f"a part of {NAME} has no shape"),
    "a negative offset": (place(offset=-1), "an item of __0_0.distcp has no place"),
    "an offset that is no number": (place(offset="28"), "an item of __0_0.distcp has no place"),
    "a negative length": (place(length=-1), "does not fit into its item"),
    "a file elsewhere": (place(relative_path="../__0_0.distcp"), "__0_0.distcp, which is not one of its files"),
    "a file that is missing": (place(relative_path="__1_0.distcp"), "__1_0.distcp is missing"),
    "no dtype": (lambda one: setattr(entry_of(one).properties, "dtype", "bfloat16"), f"{NAME} has no shape"),
    "no size": (lambda one: setattr(entry_of(one), "size", (4, 3)), f"{NAME} has no shape"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), WRONG.values(), ids=WRONG)
def test_a_table_that_its_files_do_not_bear_out_is_damaged(
    change: Callable[[Metadata], None], told: str, tmp_path: Path
) -> None:
    contents = table()
    change(contents)
    with pytest.raises(CheckpointError) as error:
        dcp_metadata.read(write(tmp_path, contents))
    assert told in str(error.value)


def test_a_table_that_is_missing_or_unreadable_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is damaged: \.metadata is missing; "):
        dcp_metadata.read(tmp_path)
    write(tmp_path, table())
    whole = (tmp_path / ".metadata").read_bytes()
    for content, told in ((whole[:-1], "cannot be read: "), (pickle.dumps({}), "is not a table of contents; ")):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"is damaged: \.metadata {told}"):
            dcp_metadata.read(tmp_path)


def test_an_entry_that_is_not_a_tensor_needs_no_file(tmp_path: Path) -> None:
    contents = table()
    contents.state_dict_metadata["extra_state"] = dcp_metadata._Layout("torch.strided")
    assert set(dcp_metadata.read(write(tmp_path, contents)).state_dict_metadata) == {NAME, "extra_state"}


@pytest.mark.parametrize("number", [-1, True, 1.0, 1 << 62])
def test_a_size_is_a_whole_number_that_fits_its_field(number: Any) -> None:
    with pytest.raises(ValueError, match="other than sizes"):
        Size((3, number))
    assert Size((0, (1 << 62) - 1)) == (0, (1 << 62) - 1)


def test_a_shape_has_a_bounded_number_of_axes() -> None:
    assert len(Size((1,) * 64)) == 64
    with pytest.raises(ValueError, match="other than sizes"):
        Size((1,) * 65)


@pytest.mark.parametrize("state", [None, ["offsets", "sizes"], {str(number): 0 for number in range(33)}], ids=str)
def test_an_object_takes_a_bounded_number_of_named_fields(state: Any) -> None:
    """Those that it does not know are of a later torch, and left out."""
    chunk_ = ChunkStorageMetadata.__new__(ChunkStorageMetadata)
    with pytest.raises(pickle.UnpicklingError, match="ChunkStorageMetadata has other fields"):
        chunk_.__setstate__(state)
    chunk_.__setstate__({"offsets": (0,)} | {str(number): 0 for number in range(31)})
    assert vars(chunk_) == {"offsets": (0,)}


def test_a_part_is_found_by_its_name_and_place() -> None:
    assert MetadataIndex(NAME, Size((2, 0)), 7) == SECOND  # its number within a file is only a hint
    assert hash(MetadataIndex(NAME, Size((2, 0)), 7)) == hash(SECOND)


def wanted(key: str, shape: tuple[int, ...]) -> Any:
    return SimpleNamespace(key=key, global_shape=shape)


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    contents = table()
    contents.state_dict_metadata["extra_state"] = dcp_metadata.Other()
    dcp_metadata.check_tensors(contents, [wanted(NAME, (4, 3))], tmp_path)
    for tensor, told in (
        (wanted("decoder.bias", (4,)), "has no tensor decoder.bias, which this model has with shape (4,)"),
        (wanted("extra_state", (1,)), "has no tensor extra_state"),
        (wanted(NAME, (4, 2)), f"{NAME} has shape (4, 3) in checkpoint {tmp_path} and (4, 2) in this model"),
    ):
        with pytest.raises(CheckpointError) as error:
            dcp_metadata.check_tensors(contents, [wanted(NAME, (4, 3)), tensor], tmp_path)
        assert told in str(error.value)
