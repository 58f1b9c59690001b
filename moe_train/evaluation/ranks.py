"""What each rank of moe-evaluate runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch import nn

from moe_train.config import sources as source_names
from moe_train.config.schema import Config, EvaluationSource
from moe_train.data import scoring as texts
from moe_train.data.datasets import build_datasets
from moe_train.data.scoring import ScoredText, Windows
from moe_train.data.tokenizer import Tokenizer
from moe_train.evaluation import setup
from moe_train.evaluation.setup import ScoringTask, SourceScore
from moe_train.inference import loading
from moe_train.loop.scoring import PassPlan, TokenLoss, score
from moe_train.ranks import RankContext
from parallel.errors import DataError
from parallel.rank_info import RankInfo

TOTAL = "total"


def run(cfg: Config, rank: RankInfo) -> None:
    """Load the model, score what the file in run_dir says, and leave the scores there."""
    task = setup.read_task(Path(cfg.run_dir))
    model = loading.load(cfg, rank)
    scores = evaluate(model.ranks, model.chunks, model.tokenizer, task)
    if rank.rank == 0:
        setup.write_scores(Path(cfg.run_dir), scores)


def evaluate(
    ranks: RankContext, chunks: Sequence[nn.Module], tokenizer: Tokenizer, task: ScoringTask
) -> list[SourceScore]:  # fmt: skip
    """Scores of each source, and of all where there are several. Every rank calls it.

    Raises:
        DataError: a text is missing, damaged or empty.
    """
    asked = _texts(ranks, tokenizer, task) if task.sources else _validation(ranks.cfg, tokenizer, task)
    with _progress(ranks, sum(map(len, asked.parts))) as advance:
        losses = score(ranks, chunks, asked.parts, len(asked.names), advance)
    sizes = asked.count_bytes() if ranks.is_main else [0] * len(losses)
    rows = list(zip(asked.names, losses, sizes, strict=True))
    if len(rows) > 1:
        rows.append((TOTAL, sum(losses, TokenLoss(0.0, 0)), sum(sizes)))
    return [_score(name, loss, size) for name, loss, size in rows]


@dataclass(frozen=True)
class _Asked:
    """Datasets as `Mixture` takes them, the names of the sources in them, and the bytes of each."""

    parts: Sequence[Any]
    names: list[str]
    count_bytes: Callable[[], list[int]]


def _texts(ranks: RankContext, tokenizer: Tokenizer, task: ScoringTask) -> _Asked:
    cfg = ranks.cfg
    names = source_names.names("evaluate.sources", task.sources)
    found: list[ScoredText] = []
    for name, source in zip(names, task.sources, strict=True):
        text = texts.read(name, source.path, task.data, tokenizer, cfg.model.vocab_size)
        found.append(text.first(task.max_tokens) if task.max_tokens else text)
    windows = [Windows(text, cfg.train.seq_length, cfg.data.reset_at_eod) for text in found]
    return _Asked(windows, names, lambda: [text.count_bytes(tokenizer) for text in found])


def _validation(cfg: Config, tokenizer: Tokenizer, task: ScoringTask) -> _Asked:
    """The samples of an evaluation of the run, in the same order."""
    run = replace(cfg, data=task.data)
    _, dataset, _ = build_datasets(run, 0, task.validation_samples, 0)
    if len(dataset) < task.validation_samples:
        raise DataError(f"the validation split has {len(dataset)} samples", "name texts with evaluate.sources")
    names = [setup.VALIDATION]
    if task.data.blend:
        entries = [EvaluationSource(path=entry.path) for entry in task.data.blend]
        names = source_names.names("data.blend", entries)
    limit = task.validation_samples
    if task.max_tokens is not None:
        limit = min(limit, max(1, task.max_tokens // cfg.train.seq_length))
    samples = _First(dataset, limit)
    return _Asked([samples], names, lambda: _bytes_of_samples(samples, len(names), tokenizer))


class _First:
    """The first samples of a dataset."""

    def __init__(self, dataset: Any, count: int) -> None:
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def _bytes_of_samples(samples: _First, sources: int, tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of the scored tokens of each source. A character that is cut by the end of a sample counts about as
    many."""
    sizes = [0] * sources
    for index in range(len(samples)):
        sample = samples[index]
        scored = sample["labels"][sample["loss_mask"] > 0].numpy().astype(np.int64)
        sizes[int(sample.get("dataset_id", 0))] += texts.text_bytes(tokenizer, scored)
    return sizes


def _score(name: str, loss: TokenLoss, num_bytes: int) -> SourceScore:
    return SourceScore(name, loss.tokens, num_bytes, loss.mean, loss.perplexity, loss.bits_per_byte(num_bytes))


@contextlib.contextmanager
def _progress(ranks: RankContext, samples: int) -> Iterator[Callable[[], None]]:
    """What to call at each forward pass: a bar on rank 0, where standard error is a terminal."""
    if not (ranks.is_main and sys.stderr.isatty()):
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("scoring", total=PassPlan.of(ranks, samples).forward_passes)
        yield lambda: bar.advance(row)
