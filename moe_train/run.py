"""The objects of a run that the step and the callbacks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.clock import StepClock
from moe_train.config.quantities import batch_schedule
from moe_train.ranks import RankContext
from moe_train.resilience.bad_steps import BadSteps
from moe_train.resilience.reactions import Reactions
from moe_train.resilience.watch import ProgressMarker
from moe_train.schedules import BatchSchedule

Metrics = dict[str, Any]


@dataclass
class TrainState:
    """How far the run is. Everything here is saved in a checkpoint."""

    step: int = 0
    consumed_samples: int = 0
    """Position in the data. It includes what a run left out when it went back after a bad step."""
    consumed_tokens: int = 0
    trained_samples: int = 0
    """Sequences of the steps so far, of any length."""
    optimizer_updates: int = 0
    """Updates of the weights, which Adam's bias correction counts. fp16 and bad steps skip some."""


class Callback:
    """Something that happens around steps. Every hook runs on every rank; write files from rank 0 only."""

    def on_start(self, run: Run) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_step_begin(self, run: Run) -> None:
        """Before each optimizer step."""

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """After each optimizer step. `metrics` has the same global values on every rank."""

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        """After each evaluation."""

    def on_event(self, run: Run, event: Metrics) -> None:
        """Something out of the ordinary: `event` has `step`, `event` (its name) and what is known of it."""

    def on_rollback(self, run: Run) -> None:
        """The run went back to `run.state.step`, and continues with data that it has not seen."""

    def on_end(self, run: Run) -> None:
        """After the last step, also when a step raised an error."""


@dataclass
class Run(RankContext):
    """One rank's view of a run."""

    total_steps: int
    run_dir: Path
    config: Any = None  # megatron.core TransformerConfig
    chunks: list[Any] = field(default_factory=list)  # DistributedDataParallel around GPTModel, one a virtual stage
    optimizer: Any = None  # megatron.core MegatronOptimizer
    objective: Any = None  # moe_train.objectives.base.Objective
    schedule: Any = None  # moe_train.optim.scheduling.ScheduledParamScheduler
    model_schedules: Any = None  # moe_train.optim.scheduling.ModelSchedules
    expert_load: Any = None  # moe_train.telemetry.model_metrics.ExpertLoad of an MoE model
    prediction_loss: Any = None  # moe_train.telemetry.model_metrics.PredictionLoss with multi-token prediction
    qk_clip: Any = None  # moe_train.optim.qk_clip.QKClip with optimizer.qk_clip_threshold
    weight_average: Any = None  # moe_train.optim.ema.WeightAverage with an EMA of the weights
    traffic: Any = None  # moe_train.telemetry.model_metrics.DispatchTraffic where tokens leave their rank
    state: TrainState = field(default_factory=TrainState)
    callbacks: list[Callback] = field(default_factory=list)
    last_batch_size: int = 0  # sequences in the step just done, over all ranks
    last_metrics: Metrics = field(default_factory=dict)  # newest training metrics
    evaluations: list[Metrics] = field(default_factory=list)
    valid_data: Any = None  # dataset of the evaluations; None without held-out text
    clock: StepClock = field(default_factory=StepClock)  # pause it around work that is not part of a step
    peak_tflops: float | None = None  # of one rank; None where it is not known
    stopped_by: str = ""  # signal that asked the run to end before its last step
    completed: bool = False  # all steps and evaluations are done; stays False when one raised an error
    pulse: ProgressMarker = field(default_factory=ProgressMarker)  # marked where a step makes progress
    bad_steps: BadSteps = field(init=False)
    reactions: Reactions = field(init=False)  # factor on the learning rate; its state is saved in a checkpoint

    def __post_init__(self) -> None:
        self.bad_steps = BadSteps(self.cfg.resilience)
        self.reactions = Reactions(self.cfg.schedule)

    def announce(self, event: str, **facts: Any) -> None:
        """Tell the callbacks that something happened. Every rank calls it."""
        for callback in self.callbacks:
            callback.on_event(self, {"step": self.state.step, "event": event, **facts})

    @property
    def batch_schedule(self) -> BatchSchedule:
        """The global batch size by the progress of the run."""
        return batch_schedule(self.cfg)

    def batch_size(self) -> int:
        """Sequences in the next step, over all ranks."""
        return self.batch_schedule.size_at(self.state.trained_samples)

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences in a global batch of an evaluation, the same at any progress: losses are to be compared."""
        return self.batch_schedule.last_size

    @property
    def micro_batches(self) -> int:
        """Forward passes of one data-parallel rank in the next step."""
        return self.micro_batches_of(self.batch_size())
