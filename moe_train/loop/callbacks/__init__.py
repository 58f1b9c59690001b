"""Everything that a run does besides its steps, one file each."""

from __future__ import annotations

from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.loop.callbacks.inject import InjectFaults
from moe_train.loop.callbacks.nvrx import NvrxHeartbeat
from moe_train.loop.callbacks.profiler import MemoryForecast, MemoryProfiler
from moe_train.loop.callbacks.progress import Progress
from moe_train.loop.callbacks.reactions import LearningRateReactions
from moe_train.loop.callbacks.recovery import Recovery
from moe_train.loop.callbacks.sinks import CloseSinks, Sinks
from moe_train.loop.callbacks.stop import StopOnSignal
from moe_train.loop.callbacks.summary import Summary
from moe_train.loop.callbacks.watchdog import Stragglers, Watchdog
from moe_train.run import Callback, Run
from moe_train.telemetry.throughput import Throughput


def from_config(run: Run) -> list[Callback]:
    """The callbacks of a run in the order in which they are called."""
    cfg = run.cfg
    watchdog, sinks, checkpoints = Watchdog(), Sinks(run), CheckpointCallback()
    callbacks: list[Callback] = [watchdog, MemoryForecast()]
    if cfg.telemetry.profile_memory_steps:
        callbacks.append(MemoryProfiler())
    callbacks += [Throughput(), sinks]  # what is measured is in the metrics before the sinks get them
    if cfg.telemetry.progress:
        callbacks.append(Progress())
    if cfg.resilience.inject:
        callbacks.append(InjectFaults())
    callbacks.append(LearningRateReactions())  # before a rollback, whose checkpoint has what follows for the rate
    callbacks.append(Recovery(checkpoints))  # before a checkpoint of this step would be written
    callbacks.append(checkpoints)  # after the metrics: every step that is saved has its line in the file
    callbacks.append(Summary())
    callbacks.append(CloseSinks(sinks))  # late, to log what the others do at the end
    if cfg.resilience.nvrx:
        callbacks.append(NvrxHeartbeat())
    if cfg.resilience.straggler_interval_steps and run.layout.world_size > 1:
        callbacks.append(Stragglers(watchdog, checkpoints))
    callbacks.append(StopOnSignal(checkpoints))  # last: it may end the run
    return callbacks
