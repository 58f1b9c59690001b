"""What is written of a Megatron checkpoint without torch is what torch would have written."""

from __future__ import annotations

import io
import pickle
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torch_metadata

from moe_train.formats import dcp, torch_item
from moe_train.formats.dtypes import DTYPES
from moe_train.formats.tensor_slices import TensorSlice
from parallel.errors import CheckpointError


class Output(io.BytesIO):
    """Written from start to end."""

    @property
    def position(self) -> int:
        return len(self.getvalue())


def records(file: io.BytesIO) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("dtype", torch_item.STORAGES)
@pytest.mark.parametrize("shape", [(5, 3), (1, 4, 2), (7,), (0, 3)])
def test_item_is_that_of_torch_save(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(2, shape).to(DTYPES[dtype].torch)
    rows, saved, out = tensor.flatten(0, -2) if len(shape) == 3 else tensor, io.BytesIO(), Output()
    torch.save(tensor, saved)
    dcp.write_item(out, DTYPES[dtype], shape, iter([TensorSlice.of(rows[:2]), TensorSlice.of(rows[2:])]))
    ours, theirs = records(out), records(saved)
    assert ours == {name: theirs[name] for name in ours}  # torch adds entries of its own
    out.seek(0)
    loaded = torch.load(out, weights_only=True)
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(loaded, tensor)


def test_the_table_of_contents_is_made_of_the_classes_of_torch() -> None:
    """Equal entry by entry and type by type to what torch's planner would have collected."""
    items = [
        dcp.Item("a", (4, 3), DTYPES["bfloat16"], (row, 0), (2, 3), f"__{row}_0.distcp", 7 * row, 70_000)
        for row in (0, 2)
    ]
    written = dcp.table([*items, dcp.Item("b", (), DTYPES["float32"], (), (), "__0_0.distcp", 1 << 33, 9)])
    index, place = torch_metadata.MetadataIndex, filesystem._StorageInfo
    half = torch.Size((2, 3))
    chunks = [torch_metadata.ChunkStorageMetadata(torch.Size((row, 0)), half) for row in (0, 2)]
    scalar = [torch_metadata.ChunkStorageMetadata(torch.Size(()), torch.Size(()))]
    expected = torch_metadata.Metadata(
        {
            "a": torch_metadata.TensorStorageMetadata(
                torch_metadata.TensorProperties(torch.bfloat16), torch.Size((4, 3)), chunks
            ),
            "b": torch_metadata.TensorStorageMetadata(
                torch_metadata.TensorProperties(torch.float32), torch.Size(()), scalar
            ),
        },
        storage_data={
            index("a", (0, 0)): place("__0_0.distcp", 0, 70_000),
            index("a", (2, 0)): place("__2_0.distcp", 14, 70_000),
            index("b", ()): place("__0_0.distcp", 1 << 33, 9),
        },
    )
    found = pickle.loads(written)
    assert found == expected
    assert repr(found) == repr(expected)  # plain tuples would be equal to sizes


def test_what_stands_for_no_objects_is_that_of_torch_save() -> None:
    saved = io.BytesIO()
    torch.save({}, saved)
    ours, theirs = records(io.BytesIO(dcp.EMPTY)), records(saved)
    assert ours == {name: theirs[name] for name in ours}
    assert torch.load(io.BytesIO(dcp.EMPTY), weights_only=True) == {}


ORDERS = {
    "from start to end": [(0, 3), (3, 8)],
    "backwards": [(4, 8), (0, 4)],
    "the beginning only": [(0, 5)],
    "the end only": [(5, 8)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("damaged", [True, False])
def test_what_is_read_is_checked_in_any_order(order: str, damaged: bool, tmp_path: Path) -> None:
    """A byte that is wrong is found even where its row is not read: the rank that wrote it wrote other rows too."""
    out = Output()
    dcp.write_item(out, DTYPES["float32"], (8, 4), [TensorSlice.of(torch.rand(8, 4))])
    content = bytearray(out.getvalue())
    if damaged:
        content[content.index(b"archive/data/0") + 14 + 4 * 16] ^= 1  # in row 4
    (tmp_path / "__0_0.distcp").write_bytes(content)
    chunk = dcp.Chunk((0, 0), (8, 4), DTYPES["float32"], tmp_path / "__0_0.distcp", 0, len(content))
    checks = dcp.Checks()
    with pytest.raises(CheckpointError, match="not those that were written") if damaged else nullcontext():
        for start, stop in ORDERS[order]:
            checks.read(chunk, chunk.extent.row_range(start, stop))
        checks.settle()
