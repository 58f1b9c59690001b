"""Next-token prediction: the mean cross entropy of the tokens that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_train.config.schema import Config
from moe_train.data.packing import packed_seq_params
from moe_train.objectives.base import Batch, Loss
from moe_train.telemetry.registry import Reduction


class LanguageModel:
    """`Objective` whose denominator is the tokens of the loss mask."""

    reductions: ClassVar[Mapping[str, Reduction]] = {}

    def __init__(self, cfg: Config) -> None:
        pass

    def forward_inputs(self, batch: Batch) -> dict[str, Any]:
        """Tokens, positions, labels, and in a packed batch the boundaries of documents."""
        return {
            "input_ids": batch["tokens"],
            "position_ids": batch["position_ids"],
            "attention_mask": None,  # causal
            "packed_seq_params": packed_seq_params(batch),
            "labels": batch["labels"],
            # Upstream counts tokens with it for multi-token prediction, and would cast fp32 to the training precision
            # first (`Float16Module`): bf16 cannot count beyond 256, and fp16 ends at 65,504.
            "loss_mask": batch["loss_mask"].double(),
        }

    def loss(self, batch: Batch, per_token_losses: Tensor) -> Loss:
        """Sum over the tokens of a micro-batch, and their number."""
        mask = batch["loss_mask"]
        total = (per_token_losses.float() * mask).sum()
        return Loss(total, mask.sum(dtype=torch.float64).to(torch.int))
