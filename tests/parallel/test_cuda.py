"""Which GPU a rank takes."""

from __future__ import annotations

import pytest

from parallel.errors import HardwareError
from parallel.rank_info import RankInfo
from parallel.runtime import cuda


def _rank(local_rank: int) -> RankInfo:
    return RankInfo(local_rank, 8, local_rank, 8, "node1", 1, "srun")


def test_a_rank_takes_the_gpu_of_its_place_or_the_only_one_that_it_sees() -> None:
    assert [cuda.device_index(_rank(i), 8) for i in range(8)] == list(range(8))
    assert [cuda.device_index(_rank(i), 1) for i in range(8)] == [0] * 8  # srun --gpus-per-task=1


def test_a_node_with_fewer_gpus_than_ranks_is_refused() -> None:
    with pytest.raises(HardwareError, match="rank 4 is number 5 on its node, which has 4 visible GPUs") as caught:
        cuda.device_index(_rank(4), 4)
    assert caught.value.exit_code == 3
