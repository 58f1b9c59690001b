"""The loss of each source of a mixture, next to that of all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_train.data.scoring import SOURCE
from moe_train.objectives.base import Batch, Loss, Objective
from moe_train.telemetry.registry import Reduction


class BySource:
    """`Objective` that sums loss and tokens of each source, for evaluation.

    Args:
        objective: that of training, whose forward pass it takes.
        sources: number of sources in the batches (`moe_train.data.scoring.SOURCE`).
    """

    def __init__(self, objective: Objective, sources: int) -> None:
        self._objective, self._sources = objective, sources
        self.reductions: Mapping[str, Reduction] = {
            f"{name}_{source}": Reduction.SUM for source in range(sources) for name in ("loss", "tokens")
        }

    def forward_inputs(self, batch: Batch) -> dict[str, Any]:
        """Those of training."""
        return self._objective.forward_inputs(batch)

    def loss(self, batch: Batch, per_token_losses: Tensor) -> Loss:
        """Loss of training, with the sum and the number of the scored tokens of each source."""
        mask, source = batch["loss_mask"].flatten().double(), batch[SOURCE].flatten()
        losses = per_token_losses.flatten().double() * mask
        zeros = torch.zeros(self._sources, dtype=torch.float64, device=mask.device)
        sums, tokens = zeros.index_add(0, source, losses), zeros.index_add(0, source, mask)
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        for number in range(self._sources):
            metrics[f"loss_{number}"], metrics[f"tokens_{number}"] = sums[number], tokens[number]
        overall = self._objective.loss(batch, per_token_losses)
        return Loss(overall.total, overall.denominator, metrics)
