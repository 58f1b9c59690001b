"""A run on one rank, from its typed config to its report. Read it top to bottom: it is the story of a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as ps
from torch import nn

from moe_train.checkpoint import checkpoint, continuing, hf_exchange
from moe_train.checkpoint.collective import on_main, say_on_main
from moe_train.config import sources
from moe_train.config.resolve import progress_of, total_steps
from moe_train.config.schema import Config
from moe_train.data import scoring
from moe_train.data.datasets import build_datasets
from moe_train.data.iterator import BatchIterator
from moe_train.data.scoring import ScoredText
from moe_train.data.tokenizer import load_tokenizer
from moe_train.loop import callbacks, step
from moe_train.objectives import base
from moe_train.optim.ema import WeightAverage
from moe_train.optim.optimizer import build_optimizer, data_parallel
from moe_train.optim.qk_clip import QKClip
from moe_train.optim.scheduling import ModelSchedules, build_schedule
from moe_train.ranks import RankContext, build_model, setup_ranks
from moe_train.run import Metrics, Run
from moe_train.schedules import BatchSchedule
from moe_train.telemetry.model_metrics import DispatchTraffic, ExpertLoad, PredictionLoss
from parallel.dispatchers import DISPATCHERS
from parallel.rank_info import RankInfo


def run(cfg: Config, rank: RankInfo) -> None:
    """Train as `rank` of a job. Every rank of the job calls this with the same config.

    Raises:
        ConfigError, DataError, CheckpointError, HardwareError: with a cause and a remedy.
    """
    run = prepare(cfg, rank)
    checkpoint.resume(run)
    set_length(run)
    checkpoint.check_places(run)
    if run.state.step >= run.total_steps:
        say_on_main(run, f"no steps to do: the run is at step {run.state.step} of {run.total_steps}")
        if cfg.export_hf and not on_main(run, checkpoint.path_of(run).exists, "read checkpoints"):
            checkpoint.save(run)  # the weights are of another run's checkpoint
        hf_exchange.export_last(run)
        if on_main(run, lambda: continuing.is_reported(cfg, checkpoint.path_of(run)), "read run_dir"):
            return
    train(run)


def set_length(run: Run) -> None:
    """How many steps are to do, which with a token budget depends on the tokens that were consumed."""
    state, position = run.state, run.schedule.num_steps
    run.total_steps = total_steps(run.cfg, state.step, state.consumed_tokens, state.trained_samples)
    set_schedules(run)
    run.schedule.step(increment=position)


def set_schedules(run: Run) -> None:
    """Build what follows a schedule, which depends on the length of the run."""
    state = run.state
    steps = progress_of(run.cfg, state.step, state.consumed_tokens, state.trained_samples)
    run.schedule = build_schedule(run.cfg, run.optimizer, steps)
    run.model_schedules = ModelSchedules(run.cfg, run.chunks, steps)


def prepare(cfg: Config, rank: RankInfo) -> Run:
    """Join the other ranks and build this rank's part of the model, with its optimizer and callbacks."""
    ranks = setup_ranks(cfg, rank)
    return build_trainer(ranks, build_model(ranks))


def build_trainer(ranks: RankContext, model: list[nn.Module]) -> Run:
    """The run that trains `model`, the chunks of `build_model`: gradient buffers, optimizer, schedule, callbacks."""
    cfg, layout, device = ranks.cfg, ranks.layout, ranks.device
    run = Run(ranks.resolved, ranks.rank, device, ranks.resolved.total_steps, Path(cfg.run_dir))
    run.config = model[0].config
    run.objective = base.create(cfg)
    if cfg.model.is_moe:
        layers = cfg.model.num_layers + cfg.model.mtp_num_layers
        run.expert_load = ExpertLoad(model, layers, cfg.model.num_experts, device)
        if layout.ep > 1 and run.backend == "local" and DISPATCHERS[cfg.parallel.dispatcher].own_on_local:
            run.traffic = DispatchTraffic(model, device)
    if cfg.model.mtp_num_layers:
        run.prediction_loss = PredictionLoss(model, cfg.model.mtp_num_layers, device)
    run.chunks = data_parallel(model, run.config, run.resolved)
    run.optimizer = build_optimizer(run.resolved, run.config, run.chunks)
    if cfg.optimizer.qk_clip_threshold is not None:
        run.qk_clip = QKClip(run.chunks, run.optimizer, cfg.model, cfg.optimizer, device)
    if cfg.optimizer.averages_weights:
        run.weight_average = WeightAverage(run.chunks, cfg.optimizer, cfg.parallel.overlap_param_gather)
    set_schedules(run)
    run.callbacks = callbacks.from_config(run)
    return run


def samples_of(run: Run) -> int:
    """Samples of all steps: of those so far, whose batches and sequences may have had other sizes, and to come.

    With `data.shuffle=run` the order of the samples depends on this number: it must be the same after a restart.
    """
    return run.batch_schedule.samples_after(run.state.trained_samples, run.total_steps - run.state.step)


def train(run: Run) -> None:
    """Step until the end of the run. All that is not the step is a callback."""
    cfg = run.cfg
    eval_count = cfg.train.eval_batches
    evaluated = eval_count * run.evaluation_batch_size
    train_data, run.valid_data, _ = build_datasets(cfg, samples_of(run), evaluated, 0)
    # A run that left data out after a bad step needs more than its steps take, and uses its first samples again.
    reader = train_reader(run, train_data, run.state.consumed_samples, wrap=True)
    batches = reader.for_chunks(run.layout.vpp)
    texts = evaluated_texts(cfg)

    def evaluate() -> None:
        if eval_count and run.valid_data is not None:
            with run.clock.paused():
                evaluation = step.evaluate(run, held_out(run).for_chunks(run.layout.vpp), eval_count)
                by_source = step.evaluate_sources(run, texts)
                averaged = evaluate_average(run, eval_count)
            if evaluation.loss is None:
                run.announce("evaluation_skipped", reason="no token of the validation batches counts towards the loss")
                return
            state = run.state
            own = {f"valid_{name}": value for name, value in evaluation.metrics.items()}
            progress = {"step": state.step, "tokens": state.consumed_tokens}
            run.evaluations.append({**progress, "valid_loss": evaluation.loss, **averaged, **own, **by_source})
            for callback in run.callbacks:
                callback.on_evaluation_end(run, run.evaluations[-1])

    with contextlib.ExitStack() as ending:
        # All of them end, in their order, even if one fails: the stack runs them from its top.
        for callback in reversed(run.callbacks):
            ending.callback(callback.on_end, run)
        for callback in run.callbacks:
            callback.on_start(run)
        evaluate()
        run.clock.start()
        while run.state.step < run.total_steps:
            tokens_before = run.state.consumed_tokens
            for callback in run.callbacks:
                callback.on_step_begin(run)
            run.last_metrics = step.train_step(run, batches)
            for callback in run.callbacks:
                callback.on_step_end(run, run.last_metrics)
            position = {name: getattr(run.state, name) for name in ("consumed_samples", "trained_samples")}
            went_back = reader.state_dict() != position
            if went_back:  # to a checkpoint, and skips data
                reader.load_state_dict(position)
            # The state of a plateau is that of the checkpoint, from before the evaluation of its step.
            counts_again = went_back and run.reactions.reacts_to_plateaus
            if run.state.step == run.total_steps or is_evaluated(run, tokens_before) or counts_again:
                evaluate()
        run.completed = True


def evaluate_average(run: Run, count: int) -> Metrics:
    """Loss of the EMA of the weights on `count` global batches of held-out text, where the run asks for it."""
    if not run.cfg.train.eval_ema:
        return {}
    with run.weight_average.applied():
        return {"valid_loss_ema": step.evaluate(run, held_out(run).for_chunks(run.layout.vpp), count).loss}


def is_evaluated(run: Run, tokens_before: int) -> bool:
    """Whether an evaluation follows the step just done, before which `tokens_before` tokens were consumed."""
    train, state = run.cfg.train, run.state
    if train.eval_interval_tokens is not None:
        return state.consumed_tokens // train.eval_interval_tokens > tokens_before // train.eval_interval_tokens
    return bool(train.eval_interval_steps) and state.step % train.eval_interval_steps == 0


def evaluated_texts(cfg: Config) -> list[ScoredText]:
    """The texts of `train.eval_sources`, or their first `train.eval_source_tokens`.

    Raises:
        DataError: one is missing, damaged, empty, or has tokens that the model does not have.
    """
    entries = cfg.train.eval_sources
    if not entries:
        return []
    tokenizer = load_tokenizer(cfg.data)
    names = sources.names("train.eval_sources", entries)
    texts = [
        scoring.read(name, entry.path, cfg.data, tokenizer, cfg.model.vocab_size)
        for name, entry in zip(names, entries, strict=True)
    ]
    most = cfg.train.eval_source_tokens
    return [text if most is None else text.first(most) for text in texts]


def train_reader(run: Run, dataset: Any, start_sample: int, wrap: bool = False) -> BatchIterator:
    """The next batches of training, for this rank."""
    return _reader(run, dataset, run.batch_schedule, start_sample, run.state.trained_samples, wrap)


def held_out(run: Run) -> BatchIterator:
    """The batches of an evaluation, for this rank."""
    return _reader(run, run.valid_data, BatchSchedule.constant(run.evaluation_batch_size), 0, 0, wrap=False)


def _reader(
    run: Run, dataset: Any, schedule: BatchSchedule, start_sample: int, trained_samples: int, wrap: bool
) -> BatchIterator:
    return BatchIterator(
        dataset,
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=run.layout.dp,
        micro_batch_size=run.cfg.batch.micro_batch_size,
        schedule=schedule,
        start_sample=start_sample,
        trained_samples=trained_samples,
        device=run.device,
        workers=run.cfg.data.loader_workers,
        wrap=wrap,
        packed=run.cfg.data.reset_at_eod,
    )
