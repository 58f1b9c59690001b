"""Measurements inside the model: expert loads, balance losses, multi-token-prediction loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from moe_train.model.layers import layer_index
from moe_train.model.local import dispatch
from moe_train.model.local.loss import LanguageModelLoss
from moe_train.run import Metrics, Run

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
                    module.register_forward_hook(self._hook(layer_index(name, module, chunk.config.num_layers)))
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


class PredictionLoss:
    """Adds up the losses of multi-token prediction over the tokens that count, in the micro-batches of a step.

    Upstream's own record (`MTPLossLoggingHelper`) is a mean of the means of micro-batches: where they have unequally
    many tokens that count it depends on their size, and one without any makes it NaN.
    """

    def __init__(self, chunks: list[Any], depths: int, device: torch.device) -> None:
        self.sums = torch.zeros(depths, 2, dtype=torch.float64, device=device)  # loss and tokens of each depth
        self._masks: list[Tensor] = []  # of the depths whose loss comes next in this micro-batch
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, GPTModel) and module.post_process:
                    self._watch(module)

    def _watch(self, model: GPTModel) -> None:
        def before(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
            self._masks = self._shifted(inputs["loss_mask"]) if module.training else []

        def observe(losses: Tensor) -> None:
            """Losses [b, s] of each depth, and at last of the next token."""
            if self._masks:
                mask = self._masks.pop(0).double()
                self.sums[-1 - len(self._masks)] += torch.stack([(losses.detach() * mask).sum(), mask.sum()])

        compute = model.compute_language_model_loss
        if not isinstance(compute, LanguageModelLoss):
            raise TypeError(f"{type(compute).__name__} is not the loss of model/local/loss.py, which can be observed")
        compute.observe = observe
        model.register_forward_pre_hook(before, with_kwargs=True)

    def _shifted(self, mask: Tensor) -> list[Tensor]:
        """The loss mask [b, s/cp] of each depth: that of one token further on."""
        masks, mask = [], mask.long()  # as integers upstream's `roll_tensor` adds up no counts
        for _ in self.sums:
            mask, _ = multi_token_prediction.roll_tensor(mask, cp_group=ps.get_context_parallel_group())
            masks.append(mask)
        return masks

    def take(self) -> float:
        """Mean over the tokens of all ranks, then over depths, and start again at zero. 0 where no token counts."""
        sums = self.sums.clone()
        self.sums.zero_()
        if ps.get_tensor_model_parallel_rank() > 0:  # these ranks have copies
            sums.zero_()
        dist.all_reduce(sums)
        total, tokens = sums.unbind(dim=1)
        return float((total / tokens.clamp(min=1)).mean())


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


def collect(run: Run, micro_batches: int) -> Metrics:
    """Balance losses and multi-token-prediction losses of the step just done, as means over the global batch.

    Args:
        micro_batches: of one data-parallel rank in that step.
    """
    cfg = run.cfg
    metrics: Metrics = {}
    if cfg.model.is_moe:
        metrics.update(_balance_losses(run, micro_batches))
        metrics["expert_load"] = run.expert_load.take().long().tolist()
        if run.traffic is not None:
            metrics["dispatch_bytes"] = run.traffic.take()
    if cfg.model.mtp_num_layers:
        metrics["mtp_loss"] = run.prediction_loss.take()
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
