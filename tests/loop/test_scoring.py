"""The loss of several texts, in layouts of ranks, against one forward pass for each sequence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.data.scoring import ScoredText, Windows
from moe_train.loop.scoring import PassPlan, TokenLoss, score
from moe_train.objectives.language_model import LanguageModel
from moe_train.ranks import build_model
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

LENGTH = small_run.SEQUENCE
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 ep2 dp2": (4, {"tp": 2, "ep": 2}),
    "cp2": (2, {"cp": 2}),
}


def two_texts() -> list[ScoredText]:
    """Of 5.5 and of 1.2 sequences."""
    draw = np.random.RandomState(1)
    counts = {"long": round(5.5 * LENGTH), "short": round(1.2 * LENGTH)}
    return [
        ScoredText(name, draw.randint(0, small_run.VOCABULARY, count), np.array([count]), None, eod=0)
        for name, count in counts.items()
    ]


def losses(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> list[TokenLoss]:
    ranks = small_run.join(
        small_run.config(run_dir, degrees, model__num_layers=4, batch__micro_batch_size=2, **changes)
    )
    windows = [Windows(text, LENGTH) for text in two_texts()]
    return score(ranks, build_model(ranks), windows, 2)


def reference(run_dir: Path) -> list[TokenLoss]:
    """Each sequence alone."""
    ranks = small_run.join(small_run.config(run_dir, {}, model__num_layers=4))
    (model,) = build_model(ranks)
    model.eval()
    objective, found = LanguageModel(ranks.cfg), []
    for text in two_texts():
        total = torch.zeros((), dtype=torch.float64)
        for sample in [Windows(text, LENGTH)[i] for i in range(len(Windows(text, LENGTH)))]:
            batch = {name: value.unsqueeze(0) for name, value in sample.items()}
            with torch.no_grad():
                total += (model(**objective.forward_inputs(batch)).double() * batch["loss_mask"]).sum()
        found.append(TokenLoss(float(total), len(text.tokens)))
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[TokenLoss]:
    return run_distributed(reference, 1, tmp_path_factory.mktemp("run"))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_scores_each_token_of_each_text_once(
    name: str, expected: list[TokenLoss], tmp_path: Path
) -> None:  # fmt: skip
    world, degrees = LAYOUTS[name]
    for found in run_distributed(losses, world, tmp_path, degrees, {}):
        assert [loss.tokens for loss in found] == [len(text.tokens) for text in two_texts()]
        assert [loss.total for loss in found] == pytest.approx([loss.total for loss in expected], rel=1e-6)


def test_numbers_that_follow_from_the_loss() -> None:
    loss = TokenLoss(100 * math.log(2), 50)
    assert loss.mean == pytest.approx(2 * math.log(2))
    assert loss.perplexity == pytest.approx(4)
    assert loss.bits_per_byte(200) == pytest.approx(0.5)
    assert loss + TokenLoss(0.0, 50) == TokenLoss(loss.total, 100)
    nothing = TokenLoss(0.0, 0)
    assert (nothing.mean, nothing.perplexity, nothing.bits_per_byte(0)) == (None, None, None)
    assert TokenLoss(1e6, 1).perplexity == math.inf
    assert math.isnan(TokenLoss(math.nan, 1).perplexity or 0)


@pytest.mark.parametrize("samples", [1, 7, 64, 1000])
def test_few_samples_are_added(samples: int, tmp_path: Path) -> None:
    from tests.loop.fake_run import fake_run

    plan = PassPlan.of(fake_run(tmp_path), samples)
    assert samples <= plan.batches * plan.batch_size < samples + plan.batches
    assert plan.forward_passes == plan.batches * plan.batch_size
