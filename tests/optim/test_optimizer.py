"""Which of Megatron-Core's optimizers a layout gets, and that torch's AdamW makes one pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed


def kinds(run_dir: Path, degrees: dict[str, int], changes: dict[str, object]) -> set[tuple[str, bool]]:
    """Class of each optimizer of this rank, and whether its AdamW is fused."""
    from moe_train.checkpoint.state import optimizers

    run = small_run.prepare(small_run.config(run_dir, degrees, **changes))
    return {(type(o).__name__, all(g["fused"] for g in o.optimizer.param_groups)) for o in optimizers(run)}


@pytest.mark.parametrize(
    ("world", "degrees", "changes", "expected"),
    [
        (1, {}, {}, "FP32Optimizer"),
        (1, {}, {"precision__dtype": "bf16"}, "Float16OptimizerWithFloat16Params"),
        (2, {}, {}, "DistributedOptimizer"),
        (2, {"tp": 2}, {}, "DistributedOptimizer"),  # the ranks hold the same experts
        (2, {"tp": 2, "etp": 2}, {}, "FP32Optimizer"),
        (2, {}, {"parallel__distributed_optimizer": False}, "FP32Optimizer"),
    ],
)
def test_state_is_sharded_where_there_are_ranks_to_share_it(
    tmp_path: Path, world: int, degrees: dict[str, int], changes: dict[str, object], expected: str
) -> None:
    for found in run_distributed(kinds, world, tmp_path, degrees, changes):
        assert found == {(expected, True)}
