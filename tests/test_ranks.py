"""A model without a trainer: built by itself, with the weights of a checkpoint in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from moe_train.checkpoint import checkpoint, weights
from moe_train.inference import held_out
from moe_train.loop import forward, step
from moe_train.objectives import base
from moe_train.ranks import build_model
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

SAVED_IN = {"tp": 2, "ep": 2}
HELD_OUT, EVALUATIONS = 1000, 2
"""First sample of the evaluation, and its global batches."""


def prompts() -> list[list[int]]:
    tokens: list[list[int]] = torch.randint(
        0, small_run.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(7)
    ).tolist()
    return tokens


def of_a_run(run_dir: Path) -> dict[str, Any]:
    """Loss of a run on held-out samples, before and after it was trained, and a continuation. It saves a checkpoint."""
    run = small_run.prepare(small_run.config(run_dir, SAVED_IN))
    losses = []
    for steps in (0, 2):
        small_run.train(run, steps)
        losses.append(step.evaluate(run, [small_run.samples_from(run, HELD_OUT) for _ in run.chunks], EVALUATIONS).loss)
    checkpoint.save(run)
    return {"losses": losses, "text": held_out.continue_prompts(run, run.chunks, prompts(), 4)}


def of_a_model(run_dir: Path, degrees: small_run.Degrees) -> dict[str, Any]:
    """The same of model chunks alone, before and after they got the weights of the newest checkpoint of the run."""
    ranks = small_run.join(small_run.config(Path("unused"), degrees))
    chunks, objective = build_model(ranks), base.create(ranks.cfg)
    assert not any(isinstance(chunk, DistributedDataParallel) for chunk in chunks)

    def loss() -> float | None:
        data = [small_run.samples_from(ranks, HELD_OUT) for _ in chunks]
        return forward.evaluate(ranks, chunks, objective, data, EVALUATIONS, small_run.BATCH).loss

    losses = [loss()]
    assert weights.load(ranks, chunks, run_dir) == run_dir / "checkpoints" / "step_00000002"
    losses.append(loss())
    return {"losses": losses, "text": held_out.continue_prompts(ranks, chunks, prompts(), 4)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run_distributed(of_a_run, 2, run_dir)[0]


@pytest.mark.parametrize(
    ("degrees", "ranks"), [(SAVED_IN, 2), ({}, 1), ({"pp": 2, "vpp": 2}, 2)], ids=["same", "one", "pipeline"]
)
def test_a_model_without_a_trainer_takes_weights_of_any_layout(
    degrees: small_run.Degrees, ranks: int, trained: tuple[Path, dict[str, Any]]
) -> None:
    run_dir, run = trained
    before, after = run["losses"]
    assert abs(before - after) > 1e-3  # so that it shows whether the weights were loaded
    for found in run_distributed(of_a_model, ranks, run_dir, degrees):
        assert found["losses"] == (run["losses"] if degrees == SAVED_IN else pytest.approx([before, after], rel=1e-6))
        assert found["text"] == run["text"]
