"""What follows a schedule: the values of a config by the progress of its run. No torch import."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from typing import Any

from moe_train.config.schedule import ScheduleSegment
from moe_train.schedules import FOLLOW_TOKENS, BatchSchedule, Schedule, Span
from parallel.suggest import Fix, Impossible, fixes_of

LR, BATCH = "lr", "batch_size"
CONFIGURED: Mapping[str, Callable[[Any], float]] = {
    LR: lambda cfg: cfg.optimizer.lr,
    "weight_decay": lambda cfg: cfg.optimizer.weight_decay,
    BATCH: lambda cfg: cfg.batch.global_batch_size,
    "mtp_loss_coeff": lambda cfg: cfg.model.mtp_loss_coeff,
    "router_bias_update_rate": lambda cfg: cfg.model.router_bias_update_rate,
    "balance_loss_scale": lambda cfg: 1.0,
}
"""Field of `schedule` -> the value that it has without segments."""
ENDS = ("until_tokens", "until_steps", "until_fraction")
_EXPONENTS = {"power": -0.51, "polynomial": 1.0}


@dataclass(frozen=True)
class RunProgress:
    """How the steps of a run are counted in training tokens.

    Args:
        batches: global batch size by sequences trained.
        seq_length: tokens in a sequence.
        step, tokens, samples: steps, tokens and sequences so far, of any size. Steps to come are counted from here.
        steps: of the whole run.
    """

    batches: BatchSchedule
    seq_length: int
    steps: int
    step: int = 0
    tokens: int = 0
    samples: int = 0

    def tokens_after(self, steps: int) -> int:
        """Training tokens of the first `steps` steps of the run. Those so far count with the sizes they have now."""
        if steps < self.step:
            return min(self.batches.samples_after(0, steps) * self.seq_length, self.tokens)
        return self.tokens + self._new_samples(steps - self.step) * self.seq_length

    def steps_after(self, tokens: int) -> int:
        """The first step that begins with at least so many `tokens` trained."""
        if tokens < self.tokens:
            return min(self.batches.steps_for(0, -(-tokens // self.seq_length)), self.step)
        return self.step + self.batches.steps_for(self.samples, -(-(tokens - self.tokens) // self.seq_length))

    @property
    def run_tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.tokens_after(max(self.steps, self.step))

    def _new_samples(self, steps: int) -> int:
        return self.batches.samples_after(self.samples, steps) - self.samples


def name_of(quantity: str, index: int) -> str:
    """How a message names a segment."""
    return f"schedule.{quantity}[{index}]"


def is_scheduled(cfg: Any, quantity: str) -> bool:
    """Whether the config gives the quantity a schedule of segments."""
    return bool(getattr(cfg.schedule, quantity))


def schedule_of(cfg: Any, quantity: str, progress: RunProgress) -> Schedule:
    """The schedule of a quantity: that of its segments, or its configured value.

    Raises:
        Impossible: the segments do not follow one another, or one cannot have its shape.
    """
    if not is_scheduled(cfg, quantity):
        return Schedule.constant(CONFIGURED[quantity](cfg))
    warmup, least = (cfg.schedule.warmup_steps, cfg.schedule.min_lr_ratio) if quantity == LR else (0, 0.0)
    builder = _Builder(quantity, getattr(cfg.schedule, quantity), CONFIGURED[quantity](cfg), least, progress)
    return builder.schedule(progress.tokens_after(warmup))


def fixed_ends(cfg: Any, quantity: str, progress: RunProgress) -> list[ScheduleSegment]:
    """The segments of a quantity with ends that do not depend on the length of the run, and the last value after it."""
    segments: Sequence[ScheduleSegment] = getattr(cfg.schedule, quantity)
    ends = [span.end for span in schedule_of(cfg, quantity, progress).spans][-len(segments) :]
    ends = [0] * (len(segments) - len(ends)) + ends  # a first segment of no length has no span
    return [
        *(
            replace(segment, until_tokens=end, until_steps=None, until_fraction=None)
            for segment, end in zip(segments, ends, strict=True)
        ),
        ScheduleSegment(),
    ]


def batch_schedule(cfg: Any) -> BatchSchedule:
    """The global batch size by the progress of the run.

    Raises:
        Impossible: `schedule.batch_size` cannot be one.
    """
    segments = cfg.schedule.batch_size
    if not segments:
        return BatchSchedule.constant(cfg.batch.global_batch_size)
    key = tuple(tuple(getattr(segment, item.name) for item in fields(ScheduleSegment)) for segment in segments)
    return _ramp(key, cfg.batch.global_batch_size, cfg.train.seq_length, cfg.schedule.batch_size_multiple)


@lru_cache(maxsize=64)
def _ramp(key: tuple[Any, ...], size: int, seq_length: int, multiple: int | None) -> BatchSchedule:
    """`batch_schedule` of segments with these values, which every step asks for."""
    segments = [ScheduleSegment(*values) for values in key]
    for index, segment in enumerate(segments):
        if segment.until_steps is not None or segment.until_fraction is not None:
            raise Impossible(
                f"{name_of(BATCH, index)} has an end in steps or a fraction of the run, which follow from batch sizes",
                [{f"schedule.{BATCH}": []}], "give it until_tokens",
            )  # fmt: skip
    last = segments[-1]
    if last.shape != "constant" and last.until_tokens is None:
        raise Impossible(
            f"{name_of(BATCH, len(segments) - 1)} has no end, and the length of the run follows from batch sizes",
            [{f"schedule.{BATCH}": [*segments[:-1], replace(last, shape="constant")]}],
            "give it until_tokens, and add a constant segment behind it",
        )
    schedule = _Builder(BATCH, segments, size, 1.0, None).schedule(0)
    named = [value for span in schedule.spans for value in (span.first, span.last)]
    for value in named:
        if value != int(value) or value < 1:
            whole = [with_whole_sizes(segment, 1) for segment in segments]
            raise Impossible(
                f"schedule.{BATCH} has {value:g} sequences, which is not a whole number of at least 1",
                [{f"schedule.{BATCH}": whole}],
            )
    divisor = reduce(math.gcd, map(int, named))
    try:
        return BatchSchedule.from_schedule(schedule, seq_length, multiple or divisor)
    except ValueError as error:
        cause = f"schedule.batch_size_multiple={multiple} does not fit schedule.{BATCH}: {error}"
        raise Impossible(cause, fixes_of("schedule.batch_size_multiple", [divisor, None])) from None


def with_whole_sizes(segment: ScheduleSegment, multiple: int) -> ScheduleSegment:
    """The segment with sizes that are multiples of `multiple`, at least one."""

    def rounded(size: float | None) -> float | None:
        return None if size is None else float(max(1, round(size / multiple)) * multiple)

    return replace(segment, value=rounded(segment.value), start=rounded(segment.start))


class _Builder:
    """Makes a `Schedule` of the segments of a quantity.

    Args:
        base: the configured value.
        least: where a segment goes without `value` and `ratio`, as a multiple of `base`.
        progress: None where all ends are in tokens.
    """

    def __init__(
        self, quantity: str, segments: Sequence[ScheduleSegment], base: float, least: float,
        progress: RunProgress | None,
    ) -> None:  # fmt: skip
        self._quantity, self._segments, self._progress = quantity, list(segments), progress
        self._base, self._least = base, least

    def schedule(self, warmup: int) -> Schedule:
        """The schedule, with a linear warm-up over the first `warmup` tokens."""
        first = self._segments[0]
        value = self._first_value(first)
        spans = [Span("linear", 0, warmup, 0.0, value)] if warmup else []
        begin = warmup
        for index, segment in enumerate(self._segments):
            end = self._end(index, begin)
            if end == 0 == index and not warmup:  # such as a warm-up of 0 steps
                value = self._last_value(segment, value)
                continue
            if end <= begin:
                raise self._not_after(index, begin, end, bool(warmup))
            span = self._span(index, begin, end, value)
            spans.append(span)
            begin, value = end, span.final
        return Schedule(tuple(spans))

    def _first_value(self, first: ScheduleSegment) -> float:
        if first.start is not None:
            return first.start
        return self._last_value(first, self._base) if first.shape == "constant" else self._base

    def _last_value(self, segment: ScheduleSegment, start: float) -> float:
        if segment.value is not None:
            return segment.value
        if segment.ratio is not None:
            return segment.ratio * self._base
        return start if segment.shape == "constant" else self._least * self._base

    def _end(self, index: int, begin: int) -> int:
        segment = self._segments[index]
        given = {name: getattr(segment, name) for name in ENDS if getattr(segment, name) is not None}
        if len(given) > 1:
            shown = " and ".join(f"{name}={value}" for name, value in given.items())
            fixes = [self._with(index, **{other: None for other in given if other != name}) for name in given]
            raise Impossible(f"{self._name(index)} has two ends: {shown}", fixes)
        if segment.until_tokens is not None:
            return segment.until_tokens
        if self._progress is not None and segment.until_steps is not None:
            return self._progress.tokens_after(segment.until_steps)
        if self._progress is not None and segment.until_fraction is not None:
            return int(segment.until_fraction * self._progress.run_tokens)
        if index + 1 < len(self._segments):
            count = len(self._segments)
            fixes = [{f"schedule.{self._quantity}": list(self._segments[: index + 1])}]
            if self._progress is not None:
                fixes.insert(0, self._with(index, until_fraction=round((index + 1) / count, 3)))
            raise Impossible(
                f"{self._name(index)} has no end, so that nothing says where {self._name(index + 1)} begins", fixes
            )
        return max(self._progress.run_tokens if self._progress else 0, begin + 1)

    def _span(self, index: int, begin: int, end: int, value: float) -> Span:
        segment = self._segments[index]
        start = value if segment.start is None else segment.start
        if segment.value is not None and segment.ratio is not None:
            raise Impossible(
                f"{self._name(index)} has value={segment.value:g} and ratio={segment.ratio:g}",
                [self._with(index, ratio=None), self._with(index, value=None)],
            )
        last = self._last_value(segment, start)
        if segment.shape == "exponential" and not (start > 0 and last > 0):
            raise Impossible(
                f"{self._name(index)} is exponential from {start:g} to {last:g}, and neither can be 0",
                [self._with(index, shape="linear")],
            )
        if segment.shape in FOLLOW_TOKENS and begin == 0:
            before = [{"schedule.warmup_steps": 20}] if self._quantity == LR else []
            raise Impossible(
                f"{self._name(index)} is {segment.shape} from token 0 on, where it has no finite value",
                [*before, self._with(index, shape="linear")],
            )
        return Span(segment.shape, begin, end, start, last, self._exponent(index))

    def _exponent(self, index: int) -> float:
        segment = self._segments[index]
        usual = _EXPONENTS.get(segment.shape)
        if segment.exponent is None or usual is None:
            if segment.exponent is not None:
                raise Impossible(
                    f"{self._name(index)} has exponent={segment.exponent:g}, which {segment.shape} does not have",
                    [self._with(index, exponent=None)],
                )
            return usual or 0.0
        if segment.exponent * usual <= 0:
            side = "below" if usual < 0 else "above"
            raise Impossible(
                f"{self._name(index)} is {segment.shape} with exponent={segment.exponent:g}, which is not {side} 0",
                [self._with(index, exponent=None), self._with(index, exponent=-segment.exponent or usual)],
            )
        return segment.exponent

    def _not_after(self, index: int, begin: int, end: int, warmup: bool) -> Impossible:
        without = {f"schedule.{self._quantity}": [s for i, s in enumerate(self._segments) if i != index]}
        if index == 0 and warmup:
            return Impossible(
                f"{self._name(0)} ends at {end:,} tokens, before the warm-up of schedule.warmup_steps ends at "
                f"{begin:,}", [{"schedule.warmup_steps": 0}, without],
            )  # fmt: skip
        where = f"{self._name(index - 1)} ends" if index else "the run begins"
        return Impossible(f"{self._name(index)} ends at {end:,} tokens, not after {begin:,}, where {where}", [without])

    def _name(self, index: int) -> str:
        return name_of(self._quantity, index)

    def _with(self, index: int, **changes: Any) -> Fix:
        changed = replace(self._segments[index], **changes)
        return {f"schedule.{self._quantity}": [*self._segments[:index], changed, *self._segments[index + 1 :]]}
