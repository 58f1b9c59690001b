"""The interface of training objectives. The loop computes, reduces and reports a loss, and knows nothing else of it.

To add an objective: write a class like `Objective` in a file of this folder, and a row for it in the table of
`moe_train/config/objective.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from moe_train.config.objective import OBJECTIVES
from moe_train.config.schema import Config
from moe_train.telemetry.registry import Reduction

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch on one rank, which has the tokens of its context-parallel part."""

    total: Tensor
    """The sum to differentiate, a scalar. The gradients of a step are divided by the denominators of all ranks."""
    denominator: Tensor
    """A count, such as tokens: an integer scalar, because Megatron-Core adds it up in int32 (schedules.py)."""
    metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A scalar for each declared metric; for a mean its sum and its denominator."""


class Objective(Protocol):
    """A loss over the tokens of a batch. Constructed from the config, once a run."""

    reductions: Mapping[str, Reduction]
    """The metrics that `loss` returns in addition to the loss: sums, means and maxima, by their names in metrics.jsonl.
    Every rank needs them: those of earlier pipeline stages take part in the reduction and compute no loss."""

    def __init__(self, cfg: Config) -> None: ...

    def forward_inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of GPTModel's forward pass. `batch` has this rank's part of each sequence, [b, s / cp]."""
        ...

    def loss(self, batch: Batch, per_token_losses: Tensor) -> Loss:
        """The loss of a micro-batch.

        Args:
            batch: as in `forward_inputs`.
            per_token_losses: -log p(label) of each token [b, s / cp].
        """
        ...


def create(cfg: Config) -> Objective:
    """The objective that `cfg.objective` names."""
    module, _, name = OBJECTIVES[cfg.objective].partition(":")
    objective: Objective = getattr(importlib.import_module(module), name)(cfg)
    return objective
