"""One optimizer step and one evaluation: batch, forward-backward, reduce, clip, update, schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moe_train.model.fp8 import delayed_scaling
from moe_train.optim import update
from moe_train.run import Metrics, Run
from moe_train.telemetry import model_metrics
from parallel import sequence

Batch = dict[str, Tensor]

NO_TOKENS = "no token of the global batch counts towards the loss: its loss mask is all zero"


def train_step(run: Run, batches: Sequence[Iterator[Batch]]) -> Metrics:
    """One optimizer step. `batches` has an iterator for each model chunk. Returns global values, equal on all ranks.

    A bad step (`bad_step` in the metrics says why) leaves weights, router biases and optimizer as they were; its data
    counts as used, and the step as done. So does a step whose batch has no token that counts; it is not a bad one, and
    its loss and gradient norm are 0.
    """
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    biases = run.expert_load.biases() if run.expert_load is not None else []
    biases_before = [bias.clone() for bias in biases]
    losses = _forward_backward(run, batches, forward_only=False)
    run.pulse.beat(run.state.step, "update")
    norm = update.gradient_norm(run.optimizer)
    loss, doubted = _mean(losses, run.device, doubt=bool(run.bad_steps.doubt(norm)))
    bad = ""
    if loss is None:
        # Upstream then leaves gradients undivided, and those of auxiliary losses are sums over tokens.
        norm = None
    else:
        bad = run.bad_steps.judge(loss, norm, doubted)
    if bad or loss is None:
        for bias, before in zip(biases, biases_before, strict=True):
            bias.copy_(before)
        delayed_scaling.discard(run.chunks)
    elif run.cfg.precision.fp8 == "delayed":
        delayed_scaling.update(run.chunks)
    learning_rate = run.schedule.optimizer.param_groups[0]["lr"] if run.optimizer.param_groups else 0.0
    updated = norm is not None and not bad and update.apply(run.optimizer, norm)
    if updated:  # fp16 skips the update when the gradients overflow
        run.state.optimizer_updates += 1
        run.schedule.step(increment=1)
    run.state.step += 1
    run.state.consumed_samples += run.cfg.batch.global_batch_size
    run.state.consumed_tokens += run.cfg.batch.global_batch_size * run.cfg.train.seq_length
    run.state.trained_samples += run.cfg.batch.global_batch_size
    metrics = {"lm_loss": loss or 0.0, "grad_norm": norm or 0.0, "lr": learning_rate}
    if not updated:
        metrics["skipped"] = True
    if bad:
        metrics["bad_step"] = bad
    if loss is None:
        metrics["no_tokens"] = True
        run.announce("skipped", reason=NO_TOKENS)
    return {**metrics, **model_metrics.collect(run)}


@torch.no_grad()
def evaluate(run: Run, batches: Sequence[Iterator[Batch]], count: int) -> float | None:
    """Mean loss over `count` global batches of held-out text, nats a token; None where none of their tokens counts."""
    for chunk in run.chunks:
        chunk.eval()
    losses: list[Tensor] = []
    for _ in range(count):
        losses += _forward_backward(run, batches, forward_only=True)
    for chunk in run.chunks:
        chunk.train()
    return _mean(losses, run.device)[0]


def _forward_backward(run: Run, batches: Sequence[Iterator[Batch]], forward_only: bool) -> list[Tensor]:
    """[loss sum, tokens] of each micro-batch, on the last pipeline stage; empty elsewhere."""
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run),
        data_iterator=list(batches) if len(batches) > 1 else batches[0],
        model=run.chunks,
        num_microbatches=run.micro_batches,
        seq_length=run.cfg.train.seq_length,
        micro_batch_size=run.cfg.batch.micro_batch_size,
        forward_only=forward_only,
    )
    return [output["loss"] for output in outputs]


def _forward_step(run: Run, batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
    run.pulse.beat(run.state.step, "forward and backward")
    batch = sequence.on_this_rank(next(batches), ps.get_context_parallel_rank(), ps.get_context_parallel_world_size())
    losses = chunk(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        # Upstream counts tokens with it for multi-token prediction, and would cast fp32 to the training precision first
        # (`Float16Module`): bf16 cannot count beyond 256, and fp16 ends at 65,504.
        loss_mask=batch["loss_mask"].double(),
    )
    return losses, partial(_loss, batch["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over the tokens of a micro-batch, [b, s] each; Megatron-Core divides by the tokens of the global batch."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum(dtype=torch.float64).to(torch.int)
    # Copies, because the schedule scales the returned loss in place. fp32 would not count beyond 2^24 tokens.
    return total, tokens, {"loss": torch.stack([total.detach().double(), tokens.double()])}


def _mean(losses: list[Tensor], device: torch.device, doubt: bool = False) -> tuple[float | None, bool]:
    """Mean over all tokens of all ranks, None where none counts, and whether any rank has a doubt. Only tensor rank 0
    of the last stage adds its losses: others hold copies."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    if losses and ps.get_tensor_model_parallel_rank() == 0:
        total[:2] += torch.stack(losses).sum(dim=0)
    total[2] = float(doubt)
    dist.all_reduce(total)
    loss, tokens, doubts = total.tolist()
    return loss / tokens if tokens else None, doubts > 0
