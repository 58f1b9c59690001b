"""Items of a Megatron checkpoint that are written a few rows at a time are those of torch.save."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from moe_train.checkpoint.hf import distcp


class Output(io.BytesIO):
    """Written from start to end."""

    @property
    def position(self) -> int:
        return len(self.getvalue())


def records(file: io.BytesIO) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("dtype", distcp._STORAGES)
@pytest.mark.parametrize("shape", [(5, 3), (1, 4, 2), (7,), (0, 3)])
def test_item_is_that_of_torch_save(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(2, shape).to(dtype)
    rows, saved, out = tensor.flatten(0, -2) if len(shape) == 3 else tensor, io.BytesIO(), Output()
    torch.save(tensor, saved)
    distcp.write_item(out, dtype, shape, iter([rows[:2], rows[2:]]))
    ours, theirs = records(out), records(saved)
    assert ours == {name: theirs[name] for name in ours}  # torch has notes of its own beside
    out.seek(0)
    loaded = torch.load(out, weights_only=True)
    assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
    assert torch.equal(loaded, tensor)
