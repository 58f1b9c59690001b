"""Batches in which no token counts towards the loss: the step is left out and said, and nothing becomes NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.loop import step
from moe_train.resilience.bad_steps import BadSteps
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.sinks.jsonl import encode
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

LOSSES: dict[str, Any] = {
    "model__balance_losses": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "model__balance_loss_coeffs": [1.0, 1.0, 1.0], "model__z_loss_coeff": 1.0,
}  # fmt: skip
FP16: dict[str, Any] = {"precision__dtype": "fp16", "precision__initial_loss_scale": 1024.0}


class Events(Callback):
    """Keeps what was announced."""

    def __init__(self) -> None:
        self.events: list[Metrics] = []

    def on_event(self, run: Run, event: Metrics) -> None:
        self.events.append(event)


def masked(batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The same text, of which nothing counts."""
    for batch in batches:
        yield {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}


def one_empty_step(run_dir: Path, degrees: small_run.Degrees, changes: dict[str, Any]) -> dict[str, Any]:
    """Two steps, one in which no token counts, and another, and an evaluation without tokens."""
    run = small_run.prepare(small_run.config(run_dir, degrees, **changes, resilience__spike_window=2))
    run.bad_steps = BadSteps(run.cfg.resilience)
    run.callbacks = [events := Events()]
    small_run.train(run, 2)
    before, rate = small_run.bits(run), run.optimizer.param_groups[0]["lr"]
    metrics = step.train_step(run, [masked(batches) for batches in small_run.batches(run)])
    same = small_run.bits(run) == before and run.optimizer.param_groups[0]["lr"] == rate
    valid = step.evaluate(run, [masked(batches) for batches in small_run.batches(run)], 1).loss
    after = step.train_step(run, small_run.batches(run))
    return {
        "line": encode(metrics), "metrics": metrics, "same": same, "valid": valid, "after": after,
        "events": events.events, "remembered": len(run.bad_steps._losses), "state": run.state,
    }  # fmt: skip


@pytest.mark.parametrize("changes", [LOSSES, {"precision__dtype": "bf16"}, FP16], ids=str)
@pytest.mark.parametrize("degrees", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_a_batch_without_tokens_is_left_out(
    degrees: small_run.Degrees, changes: dict[str, Any], tmp_path: Path
) -> None:
    """It changes nothing, does not count as a bad step, and the next step is an ordinary one."""
    for found in run_distributed(one_empty_step, 4 if degrees else 1, tmp_path, degrees, changes, timeout_s=300):
        metrics = found["metrics"]
        assert (metrics["lm_loss"], metrics["grad_norm"], metrics["mtp_loss"]) == (0.0, 0.0, 0.0)
        assert metrics["skipped"]
        assert metrics["no_tokens"]
        assert "bad_step" not in metrics
        assert found["same"], "weights, biases, moments and learning rate"
        assert "non_finite" not in found["line"]
        assert found["events"] == [{"step": 3, "event": "skipped", "reason": step.NO_TOKENS}]
        assert found["valid"] is None
        assert found["remembered"] == 2  # the last two of the three steps that count
        assert "skipped" not in found["after"]
        assert 3 < found["after"]["lm_loss"] < 6
        assert (found["state"].step, found["state"].consumed_samples) == (4, 4 * small_run.BATCH)
