"""The metrics and events of a run: name, unit, reduction over ranks, meaning, and where each appears. No torch import.

Sinks, the progress line, the summary and the loss curve take names, units and number formats from here, and
`python -m tools.metrics_reference` writes the tables of docs/metrics.md. A new metric is one row of `METRICS`, a new
event one row of `EVENTS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any


class Reduction(Enum):
    """How a metric is reduced over the micro-batches of all ranks."""

    SUM = "sum"
    MEAN = "mean"
    """Of a sum and its denominator, each summed before the division."""
    MAX = "max"


class Line(Enum):
    """Kind of line in metrics.jsonl."""

    BOTH = "training and evaluation lines"
    TRAINING = "training lines"
    EVALUATION = "evaluation lines"


class Place(Enum):
    """Where a metric appears."""

    METRICS_FILE = "metrics.jsonl"
    TENSORBOARD = "TensorBoard"
    RUN_LOG = "run.log"
    PROGRESS = "progress line"
    LOSS_CURVE = "loss.svg"
    SUMMARY = "summary.json"


@dataclass(frozen=True)
class Metric:
    """One metric. `{}` in a name is a number, as of a layer; `{name}` is a name, as of a source of text."""

    name: str
    line: Line
    unit: str
    """"" for a value without one."""
    reduction: Reduction | None
    """None where every rank has the same value."""
    doc: str
    places: frozenset[Place]
    when: str = ""
    """Condition under which it appears; "" for a metric that each line of its kind has."""
    label: str = ""
    """Name for people, where one reads it."""
    number: str = ""
    """Format of the value for people, as in `format(value, number)`."""
    progress: str = ""
    """Text in the progress line, with {} for the number; "" where it is not in that line."""

    def text(self, value: float) -> str:
        """The value as people read it, without its unit."""
        return format(value, self.number)

    def label_of(self, name: str) -> str:
        """The name for people of the metric `name`, with what is behind its slash."""
        _, slash, which = name.partition("/")
        return f"{self.label} {which}" if slash else self.label

    def matches(self, name: str) -> bool:
        """Whether a metric with this name is meant."""
        pattern = re.escape(self.name).replace(r"\{\}", r"\d+").replace(r"\{name\}", r"[\w.-]+")
        return re.fullmatch(pattern, name) is not None


@dataclass(frozen=True)
class Event:
    """One kind of event: a line with `step`, `event` (its name) and `fields`."""

    name: str
    fields: tuple[str, ...]
    doc: str


_FILE = frozenset({Place.METRICS_FILE})
_SCALAR = _FILE | {Place.TENSORBOARD}
_SPEED = _SCALAR | {Place.SUMMARY}
_LOSS = _SPEED | {Place.PROGRESS, Place.LOSS_CURVE}
_NATS = "nats per token"
_PROFILED = "in the first `telemetry.profile_memory_steps` steps"
_BALANCE = "without its coefficient: mean over MoE layers and micro-batches"


METRICS: tuple[Metric, ...] = (
    Metric(
        "step", Line.BOTH, "steps", None, "optimizer steps so far", _FILE | {Place.PROGRESS, Place.SUMMARY}
    ),
    Metric(
        "tokens", Line.BOTH, "tokens", None, "training tokens consumed so far", _FILE | {Place.SUMMARY}
    ),
    Metric(
        "lm_loss", Line.TRAINING, _NATS, Reduction.MEAN,
        "loss over the tokens of the global batch that count (loss mask), without auxiliary losses; 0 if none counts",
        _LOSS, label="training loss", number=".4f", progress="loss {}",
    ),
    Metric(
        "valid_loss", Line.EVALUATION, _NATS, Reduction.MEAN,
        "loss over `train.eval_batches` global batches of held-out text", _LOSS | {Place.RUN_LOG},
        when="`train.eval_batches` > 0 and a validation split", label="validation loss", number=".4f",
        progress="valid {}",
    ),
    Metric(
        "valid_loss/{name}", Line.EVALUATION, _NATS, Reduction.MEAN,
        "loss on a text of `train.eval_sources`, by its name; each token is scored once", _SCALAR | {Place.RUN_LOG},
        when="`train.eval_sources`", label="loss on", number=".4f",
    ),
    Metric(
        "valid_loss_ema", Line.EVALUATION, _NATS, Reduction.MEAN,
        "`valid_loss` of the exponential moving average of the weights", _SCALAR | {Place.RUN_LOG},
        when="`train.eval_ema`", label="validation loss of the EMA", number=".4f",
    ),
    Metric(
        "grad_norm", Line.TRAINING, "", None, "L2 norm of the gradients of all ranks, before clipping", _SCALAR
    ),
    Metric("lr", Line.TRAINING, "", None, "learning rate of this step", _SCALAR),
    *(
        Metric(name, Line.TRAINING, "", None, f"{what} of this step", _SCALAR, when=f"`schedule.{name}`")
        for name, what in (
            ("weight_decay", "weight decay"),
            ("mtp_loss_coeff", "weight of the multi-token-prediction loss"),
            ("router_bias_update_rate", "update of the expert bias"),
            ("balance_loss_scale", "factor on `model.balance_loss_coeffs`"),
        )
    ),
    Metric(
        "global_batch_size", Line.TRAINING, "sequences", None, "sequences of this step, over all ranks", _FILE
    ),
    Metric(
        "skipped", Line.TRAINING, "", None, "true: the weights stayed unchanged", _SCALAR,
        when="gradients in fp16 overflowed, the step was bad, or no token counted",
    ),
    Metric(
        "bad_step", Line.TRAINING, "", None, "why the step was bad ([resilience.md](resilience.md))", _FILE,
        when="the step was bad",
    ),
    Metric(
        "no_tokens", Line.TRAINING, "", None, "true: no token of the global batch counted", _SCALAR,
        when="no token of the global batch counts",
    ),
    Metric(
        "load_balancing_loss", Line.TRAINING, "", Reduction.MEAN, f"balance loss of a micro-batch, {_BALANCE}", _SCALAR,
        when="`aux_loss` in `model.balance_losses`, with a coefficient above 0",
    ),
    Metric(
        "seq_load_balancing_loss", Line.TRAINING, "", Reduction.MEAN, f"balance loss of a sequence, {_BALANCE}",
        _SCALAR, when="`seq_aux_loss` in `model.balance_losses`, with a coefficient above 0",
    ),
    Metric(
        "global_load_balancing_loss", Line.TRAINING, "", Reduction.MEAN, f"balance loss of a global batch, {_BALANCE}",
        _SCALAR, when="`global_aux_loss` in `model.balance_losses`, with a coefficient above 0",
    ),
    Metric(
        "z_loss", Line.TRAINING, "", Reduction.MEAN, f"router z-loss, {_BALANCE}", _SCALAR,
        when="`model.z_loss_coeff` is set",
    ),
    Metric(
        "dispatch_bytes", Line.TRAINING, "bytes", Reduction.SUM,
        "what token dispatch sent to other ranks in forward passes", _SCALAR,
        when="`parallel.ep` > 1 with the all-to-all dispatcher on local modules",
    ),
    Metric(
        "mtp_loss", Line.TRAINING, _NATS, Reduction.MEAN,
        "loss of multi-token prediction over the tokens that count, then the mean over depths", _SCALAR,
        when="`model.mtp_num_layers` > 0",
    ),
    Metric(
        "max_attention_logit", Line.TRAINING, "", Reduction.MAX,
        "largest attention logit of all heads, layers and micro-batches of the step, before QK-Clip", _SCALAR,
        when="`optimizer.qk_clip_threshold` is set",
    ),
    Metric(
        "qk_clipped_heads", Line.TRAINING, "heads", None,
        "heads of all layers whose projections QK-Clip rescaled after the update", _SCALAR,
        when="`optimizer.qk_clip_threshold` is set",
    ),
    Metric(
        "saved_activation_bytes", Line.TRAINING, "bytes", Reduction.MEAN,
        "activations that a micro-batch saves for its backward pass, logits included; a list with the mean over the "
        "ranks of each pipeline stage", _FILE, when=_PROFILED,
    ),
    Metric(
        "parameter_bytes", Line.TRAINING, "bytes", Reduction.MEAN, "weights, a list as above", _FILE, when=_PROFILED
    ),
    Metric(
        "gradient_bytes", Line.TRAINING, "bytes", Reduction.MEAN, "gradients, a list as above", _FILE, when=_PROFILED
    ),
    Metric(
        "optimizer_bytes", Line.TRAINING, "bytes", Reduction.MEAN, "Adam's moments and fp32 weights, a list as above",
        _FILE, when=_PROFILED,
    ),
    Metric(
        "step_time_s", Line.TRAINING, "s", Reduction.MAX,
        "mean over the steps since the last line, of the slowest rank; without evaluations and checkpoints",
        _SCALAR,
    ),
    Metric(
        "tokens_per_s", Line.TRAINING, "tokens/s", None, "over all ranks, from `step_time_s`",
        _SPEED | {Place.PROGRESS}, label="throughput", number=",.0f", progress="{} tokens/s",
    ),
    Metric(
        "tflops_per_rank", Line.TRAINING, "TFLOPS per rank", None,
        "10^12 FLOPs of the model ([below](#mfu)) per second and rank", _SPEED, number=".4g",
    ),
    Metric(
        "mfu", Line.TRAINING, "fraction", None,
        "model FLOPs utilisation: `tflops_per_rank` over the peak of one rank; null where the peak is not known",
        _SPEED | {Place.PROGRESS}, label="MFU", number=".1%", progress="MFU {}",
    ),
    Metric(
        "memory_peak_bytes", Line.TRAINING, "bytes", Reduction.MAX,
        "allocated by torch on a GPU, resident in the process on a CPU", _SPEED,
        label="memory peak",
    ),
    Metric(
        "expert_load", Line.TRAINING, "tokens", Reduction.SUM,
        "tokens of each expert in this step, a list for each MoE layer, multi-token-prediction layers last",
        _FILE | {Place.SUMMARY}, when="MoE models", label="expert load", number=".2f",
    ),
    Metric(
        "expert_load_imbalance/layer_{}", Line.TRAINING, "", None,
        "tokens of the most loaded expert of an MoE layer, relative to the mean; layers count from 1",
        frozenset({Place.TENSORBOARD}), when="MoE models",
    ),
    Metric(
        "non_finite", Line.BOTH, "", None,
        "what the values are that are null in this line, by name: `nan`, `inf` or `-inf`", _FILE,
        when="a value is not finite",
    ),
)  # fmt: skip
"""In the order of the documentation and of the progress line."""

EVENTS: tuple[Event, ...] = (
    Event(
        "skipped", ("reason", "in_a_row"),
        "the weights stayed unchanged; `in_a_row` counts bad steps, and is absent where no token counted",
    ),
    Event("evaluation_skipped", ("reason",), "no token of the validation batches counts; there is no evaluation line"),
    Event(
        "rolled_back", ("reason", "from_step", "samples_skipped"),
        "the run went back from `from_step` to the checkpoint of `step`; the samples in between are not used again",
    ),
    Event(
        "lr_rewarm", ("factor", "cooldown_steps", "rewarm_steps", "count"),
        "after a bad step the learning rate falls to `factor` of its schedule, and re-warms",
    ),
    Event(
        "lr_reduced", ("factor", "best", "count"),
        "the validation loss stayed above `best`: the learning rate is `factor` of its schedule from now on",
    ),
    Event("damaged", ("checkpoint", "reason"), "a checkpoint could not be read while the run went back"),
    Event(
        "straggler", ("rank", "host", "what", "seconds", "median_s"),
        "a rank is slower than the median of the ranks that it is compared with",
    ),
    Event(
        "sink_failed", ("sink", "reason"),
        "metrics.jsonl, TensorBoard or run.log cannot be written; the run continues and retries; once per reason",
    ),
    Event("sink_recovered", ("sink",), "what waited since `sink_failed` is written"),
)  # fmt: skip


STRICT = "MOE_TRAIN_STRICT_METRICS"
"""Environment variable; with the value 1 `check` raises an error, as in our tests."""


def metric(name: str) -> Metric:
    """The row of a metric.

    Raises:
        KeyError: it has none.
    """
    row = _find(name)
    if row is None:
        raise KeyError(f"{name} has no row in {__name__}.METRICS")
    return row


@cache
def _find(name: str) -> Metric | None:
    return next((row for row in METRICS if row.matches(name)), None)


def event(name: str) -> Event:
    """The row of an event.

    Raises:
        KeyError: it has none.
    """
    for row in EVENTS:
        if row.name == name:
            return row
    raise KeyError(f"{name} has no row in {__name__}.EVENTS")


def shown_in(place: Place) -> tuple[Metric, ...]:
    """Rows of the metrics that appear in `place`, in their order."""
    return tuple(row for row in METRICS if place in row.places)


def unregistered(line: Mapping[str, Any]) -> list[str]:
    """Keys of a line of metrics.jsonl that no row describes, for a line of an event with its name."""
    if "event" not in line:
        return [name for name in line if _find(name) is None]
    name = line["event"]
    rows = [row for row in EVENTS if row.name == name]
    if not rows:
        return [str(name)]
    known = {"step", "event", "non_finite", *rows[0].fields}
    return [f"{name}.{key}" for key in line if key not in known]


def placed_in(place: Place, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that appear in `place`. One without a row, as a callback of a user may add, is a scalar."""
    rows = ((name, _find(name)) for name in metrics)
    return {name: metrics[name] for name, row in rows if place in (_SCALAR if row is None else row.places)}


def check(line: Mapping[str, Any]) -> None:
    """Refuse what has no row, where `STRICT` is set.

    Raises:
        LookupError: it names the keys.
    """
    if os.environ.get(STRICT) == "1" and (missing := unregistered(line)):
        raise LookupError(
            f"{', '.join(missing)}: no row in {__name__}; add one and run python -m tools.metrics_reference"
        )
