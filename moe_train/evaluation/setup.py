"""What moe-evaluate asks the ranks that it starts, and what they answer: two files in run_dir. No torch import."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_train.config.schema import BlendEntry, DataConfig, EvaluationSource

ENTRY = "moe_train.evaluation.ranks:run"
"""What each rank runs."""
VALIDATION = "validation"
"""Name of the validation samples of a run that trains on one dataset."""
_TASK, _SCORES = "evaluation.json", "scores.json"


@dataclass(frozen=True)
class ScoringTask:
    """What is scored.

    Args:
        sources: texts, each with a name; empty: the validation samples of the run.
        max_tokens: of each source; None: all.
        data: of the run. Of it the sources take how text is read and what separates documents.
        validation_samples: of one evaluation of the run.
    """

    sources: Sequence[EvaluationSource]
    max_tokens: int | None
    data: DataConfig
    validation_samples: int = 0


@dataclass(frozen=True)
class SourceScore:
    """The scores of one source, or of all.

    Args:
        tokens: that were scored.
        num_bytes: of their text in UTF-8.
        loss: nats per token.
    """

    name: str
    tokens: int
    num_bytes: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None


def write_task(run_dir: Path, task: ScoringTask) -> None:
    """Leave `task` for the ranks."""
    (run_dir / _TASK).write_text(json.dumps(asdict(task)), encoding="utf-8")


def read_task(run_dir: Path) -> ScoringTask:
    """What `write_task` left."""
    content: dict[str, Any] = json.loads((run_dir / _TASK).read_text(encoding="utf-8"))
    data = content.pop("data")
    data["blend"] = [BlendEntry(**entry) for entry in data["blend"]]
    sources = [EvaluationSource(**source) for source in content.pop("sources")]
    return ScoringTask(sources=sources, data=DataConfig(**data), **content)


def write_scores(run_dir: Path, scores: Sequence[SourceScore]) -> None:
    """Leave the answer of rank 0, the total last."""
    (run_dir / _SCORES).write_text(json.dumps([asdict(score) for score in scores]), encoding="utf-8")


def read_scores(run_dir: Path) -> list[SourceScore]:
    """What `write_scores` left."""
    return [SourceScore(**score) for score in json.loads((run_dir / _SCORES).read_text(encoding="utf-8"))]
