"""A run saved in one layout continues in others as if it had not been interrupted."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import small_run
from tests.checkpoint.small_run import Degrees
from tests.distributed.helper import run_distributed

SAVED_IN: Degrees = {"tp": 2, "pp": 2, "ep": 2}
PLAIN = {"parallel__distributed_optimizer": False}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The run that saved halfway and went on, on four ranks."""
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run_distributed(small_run.save_halfway, 4, run_dir, SAVED_IN, {})


def assert_same_run(before: dict[str, Any], after: dict[str, Any], losses: float = 1e-5) -> None:
    """Same tensors halfway, moments included, same losses after it, and the same progress at the end."""
    progress = {"step": 6, "consumed_samples": 24, "consumed_tokens": 24 * 16, "trained_samples": 24}
    progress["optimizer_updates"] = 6
    assert after["state"] == before["state"] == progress
    assert after["halfway"].keys() == before["halfway"].keys()
    moments = [name for name in before["halfway"] if name.startswith("optimizer.state.exp_avg_sq.")]
    assert len(moments) > 50
    assert all(before["halfway"][name][1] > 0 for name in moments)
    for name, sums in before["halfway"].items():
        # The sums themselves are added in another order.
        assert after["halfway"][name] == pytest.approx(sums, rel=1e-12, abs=1e-9), name
    assert after["losses"] == pytest.approx(before["losses"], rel=losses)


def test_the_same_layout_continues_bit_by_bit(uninterrupted: tuple[Path, list[dict[str, Any]]]) -> None:
    run_dir, before = uninterrupted
    after = run_distributed(small_run.continue_halfway, 4, run_dir, SAVED_IN, {})
    for rank in range(4):
        assert after[rank]["losses"] == before[rank]["losses"]
        assert after[rank]["bits"] == before[rank]["bits"]
        assert after[rank]["state"] == before[rank]["state"]


@pytest.mark.parametrize(
    ("world_size", "degrees", "changes"),
    [
        (1, {}, {}),
        (2, {"pp": 2, "vpp": 2}, {}),
        (4, {"ep": 4}, {}),
        (4, {"tp": 2}, {}),
        (2, {"ep": 2}, PLAIN),
    ],
    ids=["single", "pp2-vpp2", "ep4", "tp2-dp2", "ep2-plain-optimizer"],
)
def test_other_layouts_continue_the_run(
    uninterrupted: tuple[Path, list[dict[str, Any]]], world_size: int, degrees: Degrees, changes: dict[str, Any]
) -> None:
    run_dir, before = uninterrupted
    after = run_distributed(small_run.continue_halfway, world_size, run_dir, degrees, changes)
    assert_same_run(before[0], after[0])


def test_data_parallel_ranks_with_the_plain_optimizer_save_for_the_distributed_one(tmp_path: Path) -> None:
    before = run_distributed(small_run.save_halfway, 2, tmp_path, {"ep": 2}, PLAIN)
    after = run_distributed(small_run.continue_halfway, 1, tmp_path, {}, {})
    assert_same_run(before[0], after[0])


def test_overlapped_gathering_of_weights_saves_current_weights(tmp_path: Path) -> None:
    overlap = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
    before = run_distributed(small_run.save_halfway, 2, tmp_path, {}, overlap)
    after = run_distributed(small_run.continue_halfway, 1, tmp_path, {}, {})
    assert_same_run(before[0], after[0])


def test_a_pipeline_stage_without_experts_continues(tmp_path: Path) -> None:
    """Its optimizer for experts has no tensor in the checkpoint."""
    few_layers = {"model__num_layers": 2, "model__mtp_num_layers": 0}
    before = run_distributed(small_run.save_halfway, 2, tmp_path, {"pp": 2}, few_layers)
    after = run_distributed(small_run.continue_halfway, 2, tmp_path, {"pp": 2}, few_layers)
    for rank in range(2):
        assert after[rank]["losses"] == before[rank]["losses"]
        assert after[rank]["bits"] == before[rank]["bits"]
