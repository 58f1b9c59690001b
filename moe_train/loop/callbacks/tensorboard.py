"""TensorBoard events in run_dir, under the names of metrics.jsonl."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from moe_train.loop.callbacks.metrics_file import moe_layers
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.patient_file import PatientFile
from moe_train.telemetry.throughput import is_logged


class TensorBoard(Callback):
    """Writes the scalars of logged steps and of evaluations. In place of the counts of each expert there is, for each
    MoE layer, `expert_load_imbalance/layer_N`: tokens of the fullest expert over the even share.

    TensorBoard's own writer has a thread, which ends with a traceback and takes the run with it where the disk is full.
    """

    def __init__(self) -> None:
        self._file: PatientFile | None = None
        self._opened = 0

    def on_start(self, run: Run) -> None:
        if run.is_main:
            self._open(run)

    def _open(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._opened += 1
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{self._opened}"
        self._file = PatientFile(run.run_dir / name, "events")
        self._put(file_version="brain.Event:2")
        # TensorBoard hides events of the steps that are about to be repeated.
        purged = run.state.step + 1 if run.state.step else 0
        self._put(step=purged, session_log=SessionLog(status=SessionLog.START))

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if self._file is not None and is_logged(run):
            self._write({name: value for name, value in metrics.items() if name != "expert_load"}, run.state.step)
            if "expert_load" in metrics:
                self._write(_imbalance(moe_layers(run, metrics["expert_load"])), run.state.step)

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if self._file is not None:
            self._write({"valid_loss": metrics["valid_loss"]}, metrics["step"])

    def on_rollback(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._open(run)

    def on_end(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, metrics: Metrics, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]
        self._put(step=step, summary=Summary(value=values))

    def _put(self, **fields: Any) -> None:
        """Write one event."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())


def _imbalance(load: dict[int, list[int]]) -> Metrics:
    return {f"expert_load_imbalance/layer_{i}": max(row) * len(row) / max(1, sum(row)) for i, row in load.items()}
