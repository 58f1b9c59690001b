"""TensorBoard events in run_dir, under the names of metrics.jsonl."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.telemetry.patient_file import PatientFile
from moe_train.telemetry.registry import Place
from moe_train.telemetry.sinks.base import RunEnd, RunFacts, Sink


class TensorBoard(Sink):
    """Writes the scalars of logged steps and of evaluations.

    TensorBoard's own writer has a thread, which ends with a traceback and takes the run with it where the disk is full.
    """

    name = "TensorBoard"
    place = Place.TENSORBOARD

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._file: PatientFile | None = None
        self._opened = 0

    @property
    def failure(self) -> str:
        return self._file.failure if self._file is not None else ""

    def open(self, facts: RunFacts) -> None:
        self._open(facts.first_step)

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]
        self._put(step=step, summary=Summary(value=values))

    def event(self, event: Mapping[str, Any]) -> None:
        """TensorBoard shows numbers."""

    def rewind(self, step: int) -> None:
        self._close()
        self._open(step)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self, end: RunEnd) -> None:
        self._close()

    def _open(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._opened += 1
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{self._opened}"
        self._file = PatientFile(self.run_dir / name, "events")
        self._put(file_version="brain.Event:2")
        # TensorBoard hides events of the steps that are about to be repeated.
        purged = step + 1 if step else 0
        self._put(step=purged, session_log=SessionLog(status=SessionLog.START))

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, **fields: Any) -> None:
        """Write one event."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is not None:
            RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())
