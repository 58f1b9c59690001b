"""Numbers that are not finite, against torch, in every format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_train.formats import nonfinite
from moe_train.formats.dtypes import DTYPES, of_torch
from moe_train.formats.tensor_slices import FileRegion, TensorSlice

FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_pattern_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    if size <= 2:
        bits = torch.from_numpy(np.arange(1 << 8 * size, dtype=f"u{size}").view(f"i{size}"))
    else:
        edges = torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.0, float("inf"), float("nan")
        whole_numbers = {4: torch.int32, 8: torch.int64}[size]
        bits = torch.tensor([*edges, *(-edge for edge in edges)], dtype=dtype).view(whole_numbers)
    for pattern in bits[:: max(1, len(bits) // 2048)].tolist() + bits[bits.view(dtype).float().isnan()].tolist()[:3]:
        value = torch.tensor([pattern], dtype=bits.dtype).view(dtype)
        found = nonfinite.count(of_torch(dtype), TensorSlice.of(value).data)
        wide = value.double()
        assert (found.nan, found.infinite) == (int(wide.isnan().sum()), int(wide.isinf().sum())), pattern
    whole, values = nonfinite.count(of_torch(dtype), TensorSlice.of(bits.view(dtype)).data), bits.view(dtype).double()
    assert (whole.nan, whole.infinite) == (int(values.isnan().sum()), int(values.isinf().sum()))


def test_formats_without_such_numbers_and_nothing() -> None:
    assert not nonfinite.count(DTYPES["int32"], memoryview(b"\xff" * 8))
    assert not nonfinite.count(DTYPES["float32"], memoryview(b""))
    assert nonfinite.count(DTYPES["float8_e8m0fnu"], memoryview(b"\xfe\xff\x7f")).nan == 1


def test_a_file_is_hashed_and_searched_in_one_reading(tmp_path: Path) -> None:
    values = torch.ones(3_000_000)
    values[[0, 1_048_575, 1_048_576, 2_999_999]] = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), float("nan")]
    )
    halves = torch.full((5,), float("nan"), dtype=torch.bfloat16)
    data = b"head" + bytes(TensorSlice.of(values).data) + b"gap" + bytes(TensorSlice.of(halves).data) + b"tail"
    (tmp_path / "file").write_bytes(data)
    first = FileRegion(tmp_path / "file", 4, DTYPES["float32"], (3_000_000,))
    second = FileRegion(tmp_path / "file", 4 + first.bytes + 3, DTYPES["bfloat16"], (5,))
    entry, tally = nonfinite.entry_of(tmp_path / "file", [("b", second), ("a", first)])
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert tally.found == {"a": nonfinite.Count(2, 2), "b": nonfinite.Count(5, 0)}
    assert nonfinite.entry_of(tmp_path / "file", [])[0] == entry
