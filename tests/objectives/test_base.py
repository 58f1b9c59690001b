"""The table of objectives, and an objective that is not the language model's, in several layouts of ranks."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from moe_train.config.objective import OBJECTIVES
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields
from moe_train.loop import step
from moe_train.objectives import base
from moe_train.objectives.base import Batch, Loss
from moe_train.objectives.language_model import LanguageModel
from moe_train.objectives.reduction import partial_of
from moe_train.telemetry.registry import Reduction
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

MASKED = 3
"""Tokens at the end of some samples that do not count."""


class WeightedTokens(LanguageModel):
    """Tokens weigh 1 to 3. The denominator is the sum of weights."""

    reductions: ClassVar[Mapping[str, Reduction]] = {
        "largest_nll": Reduction.MAX,
        "nll": Reduction.MEAN,
        "tokens": Reduction.SUM,
        "no_token": Reduction.MEAN,
    }

    def loss(self, batch: Batch, per_token_losses: Tensor) -> Loss:
        mask, losses = batch["loss_mask"], per_token_losses.float()
        weights = mask * (1 + batch["labels"] % 3)
        metrics = {
            "largest_nll": torch.where(mask > 0, losses, -torch.inf).max(),
            "nll": ((losses * mask).sum(), mask.sum()),
            "tokens": mask.sum(),
            "no_token": (mask.sum() * 0, mask.sum() * 0),
        }
        return Loss((losses * weights).sum(), weights.sum().to(torch.int), metrics)


def masked(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Without the last tokens of samples that begin with an odd token."""
    for batch in batches:
        batch["loss_mask"][batch["tokens"][:, 0] % 2 == 1, -MASKED:] = 0
        yield batch


def data(run: Any) -> list[Iterator[Batch]]:
    return [masked(batches) for batches in small_run.batches(run)]


def trained(run_dir: Path, degrees: small_run.Degrees, micro_batch_size: int) -> dict[str, Any]:
    """Metrics of two steps, and of an evaluation after them."""
    changes = {"batch__micro_batch_size": micro_batch_size}
    run = small_run.prepare(small_run.config(run_dir, degrees, **changes))
    run.objective = WeightedTokens(run.cfg)
    batches = data(run)
    names = ("lm_loss", "grad_norm", "mtp_loss", *WeightedTokens.reductions)
    steps = [step.train_step(run, batches) for _ in range(2)]
    valid = step.evaluate(run, data(run), 1)
    assert valid.loss is not None
    return {
        "steps": [{name: metrics[name] for name in names if name in metrics} for metrics in steps],
        "valid": {"loss": valid.loss, **valid.metrics},
    }


def by_hand(run_dir: Path) -> dict[str, float]:
    """What the first step is to measure, from one forward pass over all samples of its batch."""
    run = small_run.prepare(small_run.config(run_dir, {}, batch__micro_batch_size=small_run.BATCH))
    batch = next(data(run)[0])
    with torch.no_grad():
        losses = run.chunks[0](**run.objective.forward_inputs(batch)).double()
    counts = batch["loss_mask"] > 0
    weights = (1 + batch["labels"] % 3)[counts].double()
    return {
        "lm_loss": float((losses[counts] * weights).sum() / weights.sum()),
        "largest_nll": float(losses[counts].max()),
        "nll": float(losses[counts].mean()),
        "tokens": float(counts.sum()),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_distributed(trained, 1, Path("unused"), {}, 1)[0]


def test_loss_and_metrics_are_reduced_as_declared(alone: dict[str, Any]) -> None:
    first = alone["steps"][0]
    expected = run_distributed(by_hand, 1, Path("unused"))[0]
    assert expected["tokens"] < small_run.BATCH * small_run.SEQUENCE  # some do not count
    assert first == pytest.approx(expected | {name: first[name] for name in ("grad_norm", "mtp_loss")}, rel=1e-6)
    assert abs(first["lm_loss"] - first["nll"]) > 1e-3
    assert "no_token" not in first  # a mean over nothing
    assert alone["steps"][1]["lm_loss"] != first["lm_loss"]
    assert set(alone["valid"]) == {"loss", "largest_nll", "nll", "tokens"}


@pytest.mark.parametrize(
    ("degrees", "ranks", "micro_batch_size"),
    [({}, 1, 4), ({"ep": 2}, 2, 1), ({"tp": 2}, 2, 2), ({"cp": 2}, 2, 1), ({"tp": 2, "pp": 2}, 4, 1)],
    ids=["micro-batch", "dp", "tp", "cp", "tp-pp"],
)
def test_no_layout_changes_metrics_or_gradients(
    degrees: small_run.Degrees, ranks: int, micro_batch_size: int, alone: dict[str, Any]
) -> None:
    for found in run_distributed(trained, ranks, Path("unused"), degrees, micro_batch_size):
        assert len(found["steps"]) == 2
        for now, before in zip(found["steps"], alone["steps"], strict=True):
            assert now == pytest.approx(before, rel=1e-4)
        assert found["valid"] == pytest.approx(alone["valid"], rel=1e-4)


def test_every_row_of_the_table_is_an_objective_with_a_file() -> None:
    assert all_fields()["objective"].choices == tuple(OBJECTIVES)
    for name in OBJECTIVES:
        objective = base.create(Config(objective=name))
        assert all(isinstance(reduction, Reduction) for reduction in objective.reductions.values())
        assert type(objective).__module__ == f"moe_train.objectives.{name}"


class Declares(LanguageModel):
    reductions: ClassVar[Mapping[str, Reduction]] = {"nll": Reduction.MAX}


def partial(metrics: Any) -> Any:
    return partial_of(Declares(Config()), Loss(torch.ones([]), torch.ones([], dtype=torch.int), metrics))


def test_metrics_that_are_not_declared_are_a_bug() -> None:
    one = torch.ones([])
    assert partial({"nll": one}).maxima.tolist() == [1.0]
    for metrics in ({}, {"nll": one, "more": one}, {"nll": (one, one)}):
        with pytest.raises(ValueError, match=r"^Declares"):
            partial(metrics)


def test_the_step_knows_no_objective() -> None:
    """What a batch holds is known to objectives alone."""
    for path in sorted(Path(step.__file__).parent.glob("*.py")):
        names = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not names & {"loss_mask", "labels", "position_ids", *OBJECTIVES}, path
