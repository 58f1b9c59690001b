"""The sinks of a run: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.schema import TelemetryConfig
from moe_train.telemetry.sinks.base import Sink
from moe_train.telemetry.sinks.composite import CompositeSink
from moe_train.telemetry.sinks.jsonl import MetricsFile
from moe_train.telemetry.sinks.run_log import RunLog
from moe_train.telemetry.sinks.tensorboard import TensorBoard


@dataclass(frozen=True)
class SinkRow:
    """One sink, and the field of `telemetry` that switches it on."""

    make: Callable[[Path], Sink]
    is_on: Callable[[TelemetryConfig], bool]


SINKS = (
    SinkRow(MetricsFile, lambda telemetry: True),
    SinkRow(TensorBoard, lambda telemetry: telemetry.tensorboard),
    SinkRow(RunLog, lambda telemetry: True),  # last: it has the errors of the others
)
"""To add a sink: a file in this folder with a subclass of `Sink`, and a row here."""


def from_config(telemetry: TelemetryConfig, run_dir: Path, rows: Sequence[SinkRow] = SINKS) -> CompositeSink:
    """The sinks that are switched on. `run.log` has records from now on."""
    return CompositeSink([row.make(run_dir) for row in rows if row.is_on(telemetry)])
