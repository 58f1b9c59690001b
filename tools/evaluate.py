"""`moe-evaluate`: loss, perplexity and bits per byte of a trained model, by source of text.

    moe-evaluate runs/NAME                      its validation samples
    moe-evaluate runs/NAME book.txt data/mine   texts, datasets of moe-data
    moe-evaluate runs/NAME 'evaluate.sources=[{name:code,path:src/a.txt}]'
    moe-evaluate runs/NAME evaluate.tasks=[my_task] evaluate.task_dir=tasks
    moe-evaluate hf-directory book.txt parallel.tp=2 precision=fp8_block

The model is a run (its newest checkpoint), a Megatron checkpoint or a Hugging Face directory; it is short for source=,
further paths for evaluate.sources=. Layout and precision are those of one rank and of the run, but for what the
command line names. Tasks are those of lm-evaluation-harness.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.table import Table

from launch.local import forkserver
from moe_train.config import sources
from moe_train.config.composition.validate import validate
from moe_train.config.evaluate import EvaluateConfig
from moe_train.config.quantities import batch_schedule
from moe_train.config.roots import EvaluateRoot
from moe_train.config.schema import BatchConfig, Config, EvaluationSource
from moe_train.data.tokenizer import TOKENIZER
from moe_train.evaluation import setup
from moe_train.evaluation.setup import ScoringTask, SourceScore
from moe_train.files import atomic
from moe_train.inference import source
from moe_train.inference.source import ModelSource
from parallel.errors import ConfigError, DataError
from parallel.layout import ParallelLayout
from parallel.suggest import override_value
from tools import terminal, trained_model
from tools.trained_model import TrainedModel
from tools.words import CommandLine

if TYPE_CHECKING:
    from tools.harness import TaskScore

_SOURCES = "evaluate.sources"
_USUAL_LENGTH = 2048
"""Tokens of a sequence where no run says it."""
_COMMON = (
    "source", "tokenizer", "precision", "parallel.tp", "parallel.pp", "parallel.ep", "parallel.dp", "runtime",
    _SOURCES, "evaluate.seq_length", "evaluate.micro_batch_size", "evaluate.max_tokens", "evaluate.output",
    "evaluate.tasks", "evaluate.task_dir",
)  # fmt: skip


def main() -> NoReturn:
    """Console script."""
    trained_model.main(
        run,
        EvaluateRoot,
        about=__doc__,
        common=_COMMON,
        argv=arguments,
        answers=True,
        forks_early=False,
    )


def arguments(line: CommandLine) -> list[str]:
    """What Hydra gets: the first path as the model, the others as texts."""
    texts, line.paths = line.paths[1:], line.paths[:1]
    if texts:
        entries = [EvaluationSource(path=path) for path in texts]
        line.overrides.insert(0, f"{_SOURCES}={override_value(entries)}")
    return line.argv("source")


def run(cfg: EvaluateRoot, words: Sequence[str]) -> None:
    """Score, print a table, and write the output file.

    Args:
        words: overrides of the command line.

    Raises:
        MoeTrainError: with a cause and a remedy; no output file was written.
    """
    asked = cfg.evaluate
    sources.names(_SOURCES, asked.sources)
    if asked.output is not None:
        _check_output(Path(asked.output))
    _check_tasks(asked)
    model = trained_model.find(cfg, words, "moe-evaluate")
    if asked.tasks:
        _run_tasks(cfg, model)
        return
    found = source.find(Path(str(cfg.source)))
    task = task_of(asked, found)
    config = scoring_config(asked, found, model.cfg, model.layout)
    scores = scored(config, validate(config), task)
    title = f"{model.name}, {config.precision.name}, sequences of {config.train.seq_length:,} tokens"
    terminal.console().print(table(title, scores))
    if asked.output is not None:
        facts = {"seq_length": config.train.seq_length, "scores": [asdict(score) for score in scores]}
        write(Path(asked.output), model, facts)


def _check_tasks(asked: EvaluateConfig) -> None:
    """Raise ConfigError where tasks cannot be evaluated."""
    if not asked.tasks:
        return
    if asked.sources:
        raise ConfigError("evaluate.tasks and evaluate.sources are both set", "evaluate them one after the other")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluate.tasks needs lm-eval, which is not installed", "pip install 'moe-train[eval]'")


def _run_tasks(cfg: EvaluateRoot, model: TrainedModel) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws bars in a file too
    from tools import harness

    scores = harness.scores(model, cfg.engine, cfg.evaluate)
    terminal.console().print(task_table(f"{model.name}, {model.cfg.precision.name}", scores))
    if cfg.evaluate.output is not None:
        write(Path(cfg.evaluate.output), model, {"tasks": [asdict(score) for score in scores]})


def task_table(title: str, scores: Sequence[TaskScore]) -> Table:
    """A row for each metric of each task."""
    result = Table(title=title, title_justify="left")
    for column in ("task", "metric", "value", "standard error", "samples"):
        result.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in scores:
        value, error = _text(score.value, ",.6g"), _text(score.stderr, ".6f")
        result.add_row(terminal.literal(score.task), terminal.literal(score.metric), value, error, f"{score.samples:,}")
    return result


def _check_output(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"cannot be written: {path.parent} does not exist"
        raise ConfigError(f"evaluate.output={path} {what}", "name a file in a directory that exists")


def task_of(asked: EvaluateConfig, found: ModelSource) -> ScoringTask:
    """What the ranks score.

    Raises:
        ConfigError: there is nothing to score.
    """
    run_config = found.config
    data = run_config.data if asked.data_dir is None else replace(run_config.data, dir=asked.data_dir)
    if asked.sources:
        return ScoringTask(asked.sources, asked.max_tokens, data)
    if found.run_dir is not None and not (Path(data.dir) / TOKENIZER).is_file():
        raise ConfigError(f"{data.dir}, the data of the run, has no {TOKENIZER}", "set evaluate.data_dir to where "
                          "the dataset is now, or use moe-evaluate RUN TEXT_FILE")  # fmt: skip
    if found.run_dir is None:
        raise ConfigError(f"{_SOURCES} is missing: {found.path} is not a run, which has validation samples",
                          "use moe-evaluate MODEL TEXT_FILE")  # fmt: skip
    samples = run_config.train.eval_batches * batch_schedule(run_config).last_size
    if not samples:
        raise ConfigError(f"{_SOURCES} is missing: the run has train.eval_batches=0",
                          "use moe-evaluate RUN TEXT_FILE")  # fmt: skip
    return ScoringTask([], asked.max_tokens, data, samples)


def scoring_config(asked: EvaluateConfig, found: ModelSource, cfg: Config, layout: ParallelLayout) -> Config:
    """`cfg` with the sequences and micro-batches of the evaluation.

    Raises:
        ConfigError: sequences of this length cannot be divided over the ranks, or are too long for the model.
    """
    longest = cfg.model.max_position_embeddings
    usual = min(_USUAL_LENGTH, longest) if found.run_dir is None else found.config.train.seq_length
    length = asked.seq_length or usual
    multiple = (2 * layout.cp if layout.cp > 1 else 1) * layout.tp
    if length % multiple or length > longest:
        why = (
            f"exceeds model.max_position_embeddings={longest}" if length > longest
            else f"is not divisible by {multiple}, for parallel.tp={layout.tp} and parallel.cp={layout.cp}"
        )  # fmt: skip
        nearest = max(min(length, longest) // multiple, 1) * multiple
        raise ConfigError(f"evaluate.seq_length={length} {why}", f"use evaluate.seq_length={nearest}")
    size = asked.micro_batch_size
    return replace(
        cfg,
        batch=BatchConfig(global_batch_size=layout.dp * layout.pp * size, micro_batch_size=size),
        train=replace(cfg.train, seq_length=length),
        data=replace(cfg.data, reset_at_eod=found.config.data.reset_at_eod),
    )


def scored(cfg: Config, layout: ParallelLayout, task: ScoringTask) -> list[SourceScore]:
    """What the ranks of `layout` answer, on this machine."""
    from launch import failures, job

    with tempfile.TemporaryDirectory(prefix="moe-") as directory, failures.packages():
        if cfg.runtime == "cpu" or not any(Path("/dev").glob("nvidia*")):
            forkserver.begin()
        from launch.local import launcher

        job.resolve_runtime(cfg)
        if cfg.runtime == "cuda":
            job.check_gpus(layout, job.visible_gpus())
        setup.write_task(Path(directory), task)
        launcher.start(replace(cfg, run_dir=directory), layout, setup.ENTRY)
        return setup.read_scores(Path(directory))


def table(title: str, scores: Sequence[SourceScore]) -> Table:
    """A row for each source, the total last."""
    result = Table(title=title, title_justify="left")
    for column in ("source", "tokens", "bytes", "loss", "perplexity", "bits per byte"):
        result.add_column(column, justify="left" if column == "source" else "right")
    for score in scores:
        if score is scores[-1] and len(scores) > 1:
            result.add_section()
        numbers = (_text(score.loss, ".6f"), _text(score.perplexity, ",.4f"), _text(score.bits_per_byte, ".6f"))
        result.add_row(terminal.literal(score.name), f"{score.tokens:,}", f"{score.num_bytes:,}", *numbers)
    return result


def _text(value: float | None, number: str) -> str:
    return "" if value is None else format(value, number)


def write(path: Path, model: TrainedModel, facts: dict[str, Any]) -> None:
    """Facts about a model as JSON. Numbers that JSON cannot hold are null."""
    cfg = model.cfg
    report = {"model": model.name, "weights": cfg.init_from, "precision": cfg.precision.name, **facts}
    try:
        atomic.write_text(path, json.dumps(_finite(report), indent=1) + "\n", durable=True)
    except OSError as error:
        raise DataError(f"evaluate.output={path} cannot be written: {error.strerror}", "name another") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
