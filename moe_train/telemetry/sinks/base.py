"""Where the numbers of a run go: the interface of a sink. No torch import."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moe_train.telemetry.registry import Place


@dataclass(frozen=True)
class RunFacts:
    """What a sink knows of a run when the run starts."""

    model: str
    ranks: int
    runtime: str
    first_step: int
    """Steps that are done: 0 for a new run, more for one that continues a checkpoint."""
    total_steps: int


@dataclass(frozen=True)
class RunEnd:
    """How a run ended."""

    step: int
    completed: bool
    stopped_by: str = ""
    """The signal or reason why the run was asked to stop; "" after an error."""


class Sink(ABC):
    """Receives the metrics and events of a run, on rank 0, in the order of steps.

    A sink may raise: `CompositeSink` reports the error, keeps the call and tries again. It must not block the step: a
    sink that waits for a network does so in a thread of its own. It does not change what it receives.

    To add one: a file in this folder with a subclass, and a row in `table.SINKS`, which says what field of `telemetry`
    switches it on. It gets the metrics that have its `place` in the registry; one that wants the same scalars as
    TensorBoard has that place.
    """

    name: ClassVar[str]
    """In reports of errors."""
    place: ClassVar[Place]
    """Only the metrics of this place in the registry are passed to it."""

    def __init__(self, run_dir: Path) -> None:
        """Must not fail: it runs before errors of sinks are caught. Work that can fail belongs in `open`."""
        self.run_dir = run_dir

    @property
    def failure(self) -> str:
        """For a sink that keeps and retries records itself: why it cannot write now; "" if it can."""
        return ""

    @abstractmethod
    def open(self, facts: RunFacts) -> None:
        """Before the first step, after a checkpoint was loaded."""

    @abstractmethod
    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of a logged step (with `lm_loss`) or of an evaluation (with `valid_loss`)."""

    @abstractmethod
    def event(self, event: Mapping[str, Any]) -> None:
        """Something out of the ordinary: `step`, `event` (its name) and the fields of its row in the registry."""

    @abstractmethod
    def close(self, end: RunEnd) -> None:
        """The end of the run, also after an error, and also if `open` failed. No other call follows."""

    def rewind(self, step: int) -> None:  # noqa: B027  (most sinks have nothing to do)
        """The run went back to `step`. The steps after it follow again, with other data."""

    def flush(self) -> None:  # noqa: B027
        """Write what waits, if that is possible: the run is about to read it."""


def event_text(event: Mapping[str, Any]) -> str:
    """An event in one line."""
    fields = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("step", "event"))
    return f"step {event['step']}: {event['event']} {fields}"
