"""One rank's share of a checkpoint: what is copied, what is written, and what ends the writing early."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from moe_train.checkpoint.storage import Share, Written
from parallel.errors import CheckpointError


def share(*tensors: Tensor) -> Share:
    return Share("__0_0.distcp", [(MetadataIndex(f"t{i}"), tensor) for i, tensor in enumerate(tensors)], None)


def test_items_of_a_file_hold_their_own_numbers_only(tmp_path: Path) -> None:
    """A view of a large tensor takes no more of the disk than its numbers, and `bytes` is an upper bound."""
    whole = torch.arange(100_000.0)
    tensors = [whole[10:20], torch.ones(3, dtype=torch.bfloat16), whole.view(100, 1000)[:, 5], torch.tensor(7)]
    one = share(*tensors)
    found = one.write(tmp_path, threading.Event())
    content = (tmp_path / one.file).read_bytes()
    items = {result.index.fqn: result.storage_data for result in found.items}
    assert list(items) == ["t0", "t1", "t2", "t3"]
    for place, expected in zip(items.values(), tensors, strict=True):
        assert place.relative_path == one.file
        item = torch.load(io.BytesIO(content[place.offset : place.offset + place.length]), weights_only=True)
        assert torch.equal(item, expected)
    assert [result.size_in_bytes for result in found.items] == [place.length for place in items.values()]
    assert sum(place.length for place in items.values()) == len(content)
    numbers = sum(tensor.nbytes for tensor in tensors)
    assert numbers < len(content) <= one.bytes <= numbers + 4096 * len(tensors)
    (entry,) = found.files.values()
    assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_rank_with_nothing_to_write_makes_no_file(tmp_path: Path) -> None:
    assert share().write(tmp_path, threading.Event()) == Written([], {})
    assert list(tmp_path.iterdir()) == []


def test_writing_ends_early_when_it_is_told_to(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(CheckpointError, match="the run ended before the checkpoint was written"):
        share(torch.ones(3)).write(tmp_path, stop)


def test_a_copy_shares_no_memory_that_training_changes() -> None:
    trained, own = torch.zeros(8), torch.zeros(8)
    copied = share(trained, own).copied(unshared={own.untyped_storage().data_ptr()})
    trained += 1
    own += 1
    numbers = [tensor[0].item() for _, tensor in copied.items]
    assert numbers == [0, 1]  # memory that nobody else uses is not copied


def test_little_of_a_large_unshared_memory_is_copied() -> None:
    """It would else be kept until the checkpoint is written."""
    buffers = [torch.zeros(8) for _ in range(3)]
    unshared = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    views = [buffers[0][:3], buffers[1][:4], buffers[2][:2], buffers[2][6:]]  # 3/8, a half, and a half in two views
    copied = share(*views).copied(unshared)
    for buffer in buffers:
        buffer += 1
    assert [tensor[0].item() for _, tensor in copied.items] == [0, 1, 1, 1]
    assert [index.fqn for index, _ in copied.items] == ["t0", "t1", "t2", "t3"]


def test_a_transposed_tensor_is_copied_in_order() -> None:
    ((_, copied),) = share(torch.arange(6.0).view(2, 3).t()).copied(unshared=()).items
    assert copied.is_contiguous()
    assert copied.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_only_the_first_rank_writes_the_table_of_contents(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="only the first rank"):
        share(torch.ones(3)).write_table(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
