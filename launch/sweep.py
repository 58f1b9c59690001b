"""The end of a sweep (-m): one row for each job, with what differs between them and how they ended. No torch import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_train.checkpoint.continuing import SUMMARY
from moe_train.config.composition.compose import SweepJob
from moe_train.files import untrusted


def show(jobs: Sequence[SweepJob]) -> None:
    """Print the table. A job that failed has its exit code instead of losses."""
    Console(highlight=False).print(table(jobs))


def table(jobs: Sequence[SweepJob]) -> Table:
    """Overrides, losses, time and directory of each job."""
    common = set(jobs[0].words).intersection(*(job.words for job in jobs))
    result = Table("job", "overrides", "training loss", "validation loss", "time", "run_dir", title="Sweep")
    for number, job in enumerate(jobs):
        words = " ".join(word for word in job.words if word not in common)
        losses = (f"failed: exit code {job.exit_code}", "") if job.exit_code else _losses(Path(job.run_dir, SUMMARY))
        cells = (str(number), words, *losses, _duration(job.seconds), job.run_dir)
        result.add_row(*(_text(cell) for cell in cells))
    return result


def _losses(summary: Path) -> tuple[str, str]:
    try:
        values = untrusted.read_object(summary)
        return _ends(values.get("train_loss") or {}), _ends(values.get("valid_loss") or {})
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""  # the summary could not be written, of which the run has warned


def _ends(loss: dict[str, float | None]) -> str:
    if not loss:
        return ""
    first, last = ("not finite" if value is None else f"{value:.4f}" for value in (loss["first"], loss["last"]))
    return f"{first} to {last}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _text(cell: str) -> str:
    return cell.replace("[", "\\[")  # rich would take it for a style
