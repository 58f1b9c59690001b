"""Measurements inside the model: expert loads, balance losses, multi-token-prediction loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor, nn

from moe_train.loop.run import Metrics, Run
from moe_train.model import dispatch

# Names under which Megatron-Core's router records its losses.
_BALANCE_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss")


class ExpertLoad:
    """Counts the tokens that each router sends to each expert, over the micro-batches of a step."""

    def __init__(self, chunks: list[Any], layers: int, experts: int, device: torch.device) -> None:
        self.counts = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        self._routers: list[Any] = []
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, TopKRouter):
                    number = module.layer_number
                    if ".mtp." in f".{name}" and number <= chunk.config.num_layers:
                        number += chunk.config.num_layers  # some versions number these layers from 1 again
                    module.register_forward_hook(self._hook(number - 1))
                    self._routers.append(module)

    def _hook(self, layer: int) -> Any:
        def count(module: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> None:
            if module.training and torch.is_grad_enabled():
                self.counts[layer] += output[1].sum(dim=0)

        return count

    def biases(self) -> list[Tensor]:
        """Of the routers of this rank that balance by a bias, which Megatron-Core moves with the gradients."""
        return [router.expert_bias for router in self._routers if router.expert_bias is not None]

    def take(self) -> Tensor:
        """Tokens of each expert over all ranks [layers, experts], and start again at zero."""
        counts = self.counts.clone()
        self.counts.zero_()
        dist.all_reduce(counts)  # sequence and context parallel ranks route their own parts of the sequence
        return counts


class DispatchTraffic:
    """Bytes of tokens that ranks send to experts on other ranks, over the micro-batches of a step."""

    def __init__(self, chunks: list[Any], device: torch.device) -> None:
        self.dispatchers, self.device = dispatch.dispatchers(chunks), device

    def take(self) -> int:
        """Bytes sent by all ranks in forward passes, and start again at zero."""
        total = torch.zeros(1, dtype=torch.int64, device=self.device)
        for dispatcher in self.dispatchers:
            total += dispatcher.sent_bytes
            dispatcher.sent_bytes = 0
        dist.all_reduce(total)
        return int(total)


def collect(run: Run) -> Metrics:
    """Balance losses and multi-token-prediction losses of the step just done, as means over the global batch."""
    cfg = run.cfg
    metrics: Metrics = {}
    if cfg.model.is_moe:
        metrics.update(_balance_losses(run, run.micro_batches))
        metrics["expert_load"] = run.expert_load.take().long().tolist()
        if run.traffic is not None:
            metrics["dispatch_bytes"] = run.traffic.take()
    if cfg.model.mtp_num_layers:
        metrics["mtp_loss"] = _mtp_loss(run, run.micro_batches)
    return metrics


def _balance_losses(run: Run, micro_batches: int) -> Metrics:
    """Mean over MoE layers and micro-batches. A stage without MoE layers adds nothing to the sum over ranks."""
    layout, model = run.layout, run.cfg.model
    repeats = dict(zip(_BALANCE_LOSSES, (layout.dp, layout.dp, 1, layout.dp * layout.tp * layout.cp), strict=True))
    tracker = get_moe_layer_wise_logging_tracker()
    totals = torch.zeros(len(_BALANCE_LOSSES), dtype=torch.float64, device=run.device)
    for i, name in enumerate(_BALANCE_LOSSES):
        if name in tracker:
            totals[i] = tracker[name]["values"].double().sum() / repeats[name]
    clear_aux_losses_tracker()
    dist.all_reduce(totals)
    layers = (sum(model.moe_layer_pattern) + model.mtp_num_layers) * micro_batches
    return {name: float(total) / layers for name, total in zip(_BALANCE_LOSSES, totals, strict=True) if total != 0}


def _mtp_loss(run: Run, micro_batches: int) -> float:
    """Mean over prediction depths; only the last pipeline stage knows it."""
    losses: dict[str, Any] = {}
    MTPLossLoggingHelper.track_mtp_metrics(1.0 / micro_batches, run.state.step, writer=None, total_loss_dict=losses)
    mean = torch.zeros(1, dtype=torch.float64, device=run.device)
    if losses:
        mean += torch.stack([loss.double() for loss in losses.values()]).mean()
    dist.all_reduce(mean, op=dist.ReduceOp.MAX)
    return float(mean)
