"""The zig-zag division of a sequence over context-parallel ranks."""

from __future__ import annotations

import torch

from parallel import sequence


def test_each_rank_has_a_slice_from_either_end() -> None:
    batch = {"tokens": torch.arange(8).expand(3, 8)}
    first, second = (sequence.on_this_rank(batch, rank, 2) for rank in range(2))
    assert first["tokens"].tolist() == [[0, 1, 6, 7]] * 3
    assert second["tokens"].tolist() == [[2, 3, 4, 5]] * 3


def test_without_context_parallelism_the_batch_is_whole() -> None:
    batch = {"tokens": torch.arange(8)[None]}
    assert sequence.on_this_rank(batch, 0, 1) is batch
