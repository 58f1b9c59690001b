"""Several sinks as one. No error of a sink ends a run. No torch import."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moe_train.telemetry import registry
from moe_train.telemetry.patient_file import warn
from moe_train.telemetry.sinks.base import RunEnd, RunFacts, Sink

MOST_WAITING = 1000
"""Calls that wait for one sink. Further metrics are lost. A rewind is not, or a file would have steps twice."""
MOST_TRIES = 10
"""Tries of a call that fails with something else than OSError: its own data may be the cause, and later calls wait."""

Call = Callable[[], None]


class CompositeSink:
    """Passes each call to all sinks, with the methods of `Sink`.

    A sink that raises neither stops training nor affects the other sinks. The failed call waits, with all later calls
    of that sink, and is tried again before the next one. Each kind of error is reported once: on the terminal, and to
    the other sinks as the event `sink_failed`. `sink_recovered` follows when nothing waits any more.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._guards = [_Guard(sink) for sink in sinks]
        self._step = 0

    def open(self, facts: RunFacts) -> None:
        self._step = facts.first_step
        for guard in self._guards:
            guard.open(facts)
        self._report()

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._step = step
        for guard in self._guards:
            if placed := registry.placed_in(guard.sink.place, metrics):
                guard.call(partial(guard.sink.scalars, step, placed), can_be_lost=True)
        self._report()

    def event(self, event: Mapping[str, Any]) -> None:
        self._step = event["step"]
        for guard in self._guards:
            guard.call(partial(guard.sink.event, event))
        self._report()

    def rewind(self, step: int) -> None:
        self._step = step
        for guard in self._guards:
            guard.call(partial(guard.sink.rewind, step))
        self._report()

    def flush(self) -> None:
        for guard in self._guards:
            guard.call(guard.sink.flush)
        self._report()

    def close(self, end: RunEnd) -> None:
        """Try what waits once more, report how much is lost, and close all sinks."""
        self.flush()
        for guard in self._guards:
            guard.close(end)

    def _report(self) -> None:
        """Pass what failed or recovered to the other sinks, after the call itself and not among its lines."""
        for failing in self._guards:
            for report in failing.take_reports():
                event = {"step": self._step, **report, "sink": failing.sink.name}
                for guard in self._guards:
                    if guard is not failing:
                        guard.call(partial(guard.sink.event, event))


class _Guard:
    """One sink, with the calls that wait for it. No method raises an error of the sink."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._waiting: deque[Call] = deque()
        self._open: Call | None = None
        self._tries, self._late, self._lost = 0, 0, 0
        self._error = ""
        """Of the call that waits first."""
        self._kinds: set[str] = set()
        """Kinds of errors that were reported."""
        self._is_reported = False
        """Whether the others know that the sink fails at the moment."""
        self._reports: list[dict[str, Any]] = []

    def open(self, facts: RunFacts) -> None:
        self._open = partial(self.sink.open, facts)
        self.call(self._open)

    def call(self, function: Call, can_be_lost: bool = False) -> None:
        """Do what waits, and then this, or keep it."""
        if can_be_lost and len(self._waiting) >= MOST_WAITING:
            self._lost += 1
        else:
            self._waiting.append(function)
        self._drain()
        if not self._error:
            self._compare_own_failure()

    def take_reports(self) -> list[dict[str, Any]]:
        """Events for the other sinks since the last call, without `step` and `sink`."""
        reports, self._reports = self._reports, []
        return reports

    def close(self, end: RunEnd) -> None:
        """What still waits is lost."""
        if lost := self._lost + len(self._waiting):
            warn(f"{lost} records of {self.sink.name} are lost: {self._error or 'too many waited'}")
        self._waiting.clear()
        try:
            self.sink.close(end)
        except Exception as error:
            warn(f"{self.sink.name} cannot be closed: {_text(error)}")

    def _drain(self) -> None:
        is_late = bool(self._error)
        while self._waiting:
            try:
                self._waiting[0]()
            except Exception as error:
                self._fail(error)
                return
            self._waiting.popleft()
            self._late += is_late and bool(self._waiting)
            self._tries = 0
        if self._error:
            self._error = ""
            if self._is_reported or self._lost:
                warn(f"{self.sink.name} works again: {self._late} records came late, {self._lost} were lost")
            self._late, self._lost = 0, 0

    def _fail(self, error: Exception) -> None:
        self._error = _text(error)
        self._tries += 1
        if self._report_failure(f"{type(error).__name__} {getattr(error, 'errno', '')}", self._error):
            warn(f"{self.sink.name} failed: {self._error}; the run continues, and its records follow later")
        is_outage = isinstance(error, OSError) or self._waiting[0] is self._open  # nothing works without `open`
        if self._tries >= MOST_TRIES and not is_outage:
            self._waiting.popleft()
            self._tries = 0
            self._lost += 1

    def _compare_own_failure(self) -> None:
        """A sink that retries itself has said on the terminal that it fails, or works again."""
        if failure := self.sink.failure:
            self._report_failure(failure, failure)
        elif self._is_reported:
            self._is_reported = False
            self._reports.append({"event": "sink_recovered"})

    def _report_failure(self, kind: str, reason: str) -> bool:
        """Report to the other sinks, once for each kind. Returns whether it is the first time."""
        if kind in self._kinds:
            return False
        self._kinds.add(kind)
        self._is_reported = True
        self._reports.append({"event": "sink_failed", "reason": reason})
        return True


def _text(error: Exception) -> str:
    """One line: errors of libraries can have several."""
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(f"{type(error).__name__}: {reason}".split())
