"""One optimizer step and one evaluation: batch, forward-backward, reduce, clip, update, schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from moe_train.data.scoring import ScoredText, Windows
from moe_train.loop import forward
from moe_train.loop.scoring import score
from moe_train.model.fp8 import delayed_scaling
from moe_train.objectives.base import Batch
from moe_train.objectives.reduction import Reduced, reduce
from moe_train.optim import update
from moe_train.run import Metrics, Run
from moe_train.telemetry import model_metrics

NO_TOKENS = "no token of the global batch counts towards the loss: its loss mask is all zero"


def train_step(run: Run, batches: Sequence[Iterator[Batch]]) -> Metrics:
    """One optimizer step. `batches` has an iterator for each model chunk. Returns global values, equal on all ranks.

    A bad step (`bad_step` in the metrics says why) leaves weights, router biases and optimizer unchanged; its data
    counts as used, and the step as done. So does a step whose batch has no token that counts; it is not a bad one, and
    its loss and gradient norm are 0.
    """
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    scheduled = _set_scheduled(run)
    if run.qk_clip is not None:
        run.qk_clip.start()
    biases = run.expert_load.biases() if run.expert_load is not None else []
    biases_before = [bias.clone() for bias in biases]
    samples = run.batch_size()
    partials = forward.forward_backward(
        run, run.chunks, run.objective, batches, samples, forward_only=False, beat=partial(_beat, run)
    )
    run.pulse.mark(run.state.step, "update")
    norm = update.gradient_norm(run.optimizer)
    reduced = reduce(run.objective, partials, run.device, anomaly=bool(run.bad_steps.grad_norm_anomaly(norm)))
    loss = reduced.loss
    bad = ""
    if loss is None:
        # Upstream then leaves gradients undivided, and those of auxiliary losses are sums over tokens.
        norm = None
    else:
        bad = run.bad_steps.classify(loss, norm, reduced.anomaly)
    if bad or loss is None:
        for bias, before in zip(biases, biases_before, strict=True):
            bias.copy_(before)
        delayed_scaling.discard(run.chunks)
    else:
        delayed_scaling.update(run.chunks)
    learning_rate = run.schedule.get_lr({})  # of parameters without a multiplier of their own
    if run.weight_average is not None:
        run.weight_average.wait()  # it reads the weights
    updated = norm is not None and not bad and update.apply(run.optimizer, norm)
    if updated:  # fp16 skips the update when the gradients overflow
        run.state.optimizer_updates += 1
        run.schedule.step(increment=1)
    run.last_batch_size = samples
    run.state.step += 1
    run.state.consumed_samples += samples
    run.state.consumed_tokens += samples * run.cfg.train.seq_length
    run.state.trained_samples += samples
    metrics = {"lm_loss": loss or 0.0, "grad_norm": norm or 0.0, "lr": learning_rate}
    if not updated:
        metrics["skipped"] = True
    if bad:
        metrics["bad_step"] = bad
    if loss is None:
        metrics["no_tokens"] = True
        run.announce("skipped", reason=NO_TOKENS)
    if run.qk_clip is not None:
        clipped = run.qk_clip.finish(updated)
        metrics |= {"max_attention_logit": clipped.largest, "qk_clipped_heads": clipped.heads}
    if updated and run.weight_average is not None:
        run.weight_average.start(samples * run.cfg.train.seq_length)
    return {**metrics, **scheduled, **reduced.metrics, **model_metrics.collect(run, run.micro_batches_of(samples))}


def _set_scheduled(run: Run) -> Metrics:
    """Set what follows a schedule for this step. Returns the values that segments give, but the learning rate."""
    tokens, factor = run.state.consumed_tokens, run.reactions.factor(run.state.step)
    return {**run.schedule.set_progress(tokens, factor), **run.model_schedules.set_progress(tokens)}


def evaluate(run: Run, batches: Sequence[Iterator[Batch]], count: int) -> Reduced:
    """Loss and metrics of the objective over `count` global batches of held-out text."""
    samples = run.evaluation_batch_size
    return forward.evaluate(run, run.chunks, run.objective, batches, count, samples, partial(_beat, run))


def evaluate_sources(run: Run, texts: Sequence[ScoredText]) -> Metrics:
    """Loss on each text, by the name of its metric; a text without scored tokens has none."""
    windows = [Windows(text, run.cfg.train.seq_length, run.cfg.data.reset_at_eod) for text in texts]
    losses = score(run, run.chunks, windows, len(texts), partial(_beat, run)) if windows else []
    found = zip(texts, losses, strict=True)
    return {f"valid_loss/{text.name}": loss.mean for text, loss in found if loss.mean is not None}


def _beat(run: Run) -> None:
    run.pulse.mark(run.state.step, "forward and backward")
