"""TensorBoard events in run_dir, under the names of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from moe_train.loop.callbacks.metrics_file import moe_layers
from moe_train.loop.run import Callback, Metrics, Run
from moe_train.telemetry.throughput import is_logged


class TensorBoard(Callback):
    """Writes the scalars of logged steps and of evaluations. In place of the counts of each expert there is, for each
    MoE layer, `expert_load_imbalance/layer_N`: tokens of the fullest expert over the even share."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, run: Run) -> None:
        if run.is_main:
            self._open(run)

    def _open(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        # TensorBoard hides events of the steps that are about to be repeated.
        self._writer = SummaryWriter(str(run.run_dir), purge_step=run.state.step + 1 if run.state.step else 0)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if self._writer is not None and is_logged(run):
            self._write({name: value for name, value in metrics.items() if name != "expert_load"}, run.state.step)
            if "expert_load" in metrics:
                self._write(_imbalance(moe_layers(run, metrics["expert_load"])), run.state.step)

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if self._writer is not None:
            self._write({"valid_loss": metrics["valid_loss"]}, metrics["step"])

    def on_rollback(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()
            self._open(run)

    def on_end(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)


def _imbalance(load: dict[int, list[int]]) -> Metrics:
    return {f"expert_load_imbalance/layer_{i}": max(row) * len(row) / max(1, sum(row)) for i, row in load.items()}
