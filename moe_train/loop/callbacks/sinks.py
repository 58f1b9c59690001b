"""Passes what a run measures, and what happens in it, to the sinks of rank 0."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry import expert_load, registry
from moe_train.telemetry.sinks import table
from moe_train.telemetry.sinks.base import RunEnd, RunFacts, event_text
from moe_train.telemetry.sinks.table import SINKS, SinkRow
from moe_train.telemetry.throughput import is_logged


class Sinks(Callback):
    """Metrics of logged steps and of evaluations, and events. `CloseSinks` closes the sinks after `on_end`."""

    def __init__(self, run: Run, rows: Sequence[SinkRow] = SINKS) -> None:
        self.sinks = table.from_config(run.cfg.telemetry, run.run_dir, rows) if run.is_main else None

    def on_start(self, run: Run) -> None:
        if self.sinks is not None:
            ranks = run.layout.world_size
            self.sinks.open(RunFacts(run.cfg.model.name, ranks, run.runtime, run.state.step, run.total_steps))

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if self.sinks is not None and is_logged(run):
            record = training_record(run, metrics)
            registry.check(record)
            self.sinks.scalars(run.state.step, record)

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if self.sinks is not None:
            registry.check(metrics)
            self.sinks.scalars(metrics["step"], {name: value for name, value in metrics.items() if name != "step"})

    def on_event(self, run: Run, event: Metrics) -> None:
        """Events are out of the ordinary: the terminal shows them too."""
        if self.sinks is not None:
            registry.check(event)
            self.sinks.event(event)
            print(f"warning: {event_text(event)}", file=sys.stderr, flush=True)

    def on_rollback(self, run: Run) -> None:
        if self.sinks is not None:
            self.sinks.rewind(run.state.step)

    def on_end(self, run: Run) -> None:
        if self.sinks is not None:
            self.sinks.flush()  # the summary reads metrics.jsonl


class CloseSinks(Callback):
    """The end of the sinks. It comes late in the list, so that run.log has what other callbacks log at the end."""

    def __init__(self, sinks: Sinks) -> None:
        self._sinks = sinks

    def on_end(self, run: Run) -> None:
        if self._sinks.sinks is not None:
            self._sinks.sinks.close(RunEnd(run.state.step, run.completed, run.stopped_by))


def training_record(run: Run, metrics: Metrics) -> Metrics:
    """The metrics of the step just done, in the order of metrics.jsonl. The longest come last."""
    record: Metrics = {"tokens": run.state.consumed_tokens}
    record |= {name: metrics[name] for name in ("lm_loss", "grad_norm", "lr")}
    record["global_batch_size"] = run.last_batch_size
    record |= {name: value for name, value in metrics.items() if name not in record and name != "expert_load"}
    if "expert_load" in metrics:
        load = expert_load.by_moe_layer(run.cfg.model, metrics["expert_load"])
        record |= expert_load.imbalance(load)
        record["expert_load"] = list(load.values())
    return record
