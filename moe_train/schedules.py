"""Settings that depend on the progress of a run. No torch import.

A `Schedule` is a number by the training tokens so far: learning rate, weight decay, coefficients of losses. The global
batch size is a function of the sequences trained so far, so that a run that resumes, in any layout, makes the same
batches of the same samples.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

MOST_BATCH_SIZES = 10_000
"""Largest number of batch sizes that a ramp passes."""


@dataclass(frozen=True)
class Span:
    """A part of a schedule in one shape.

    Args:
        shape: a key of `SHAPES`.
        begin, end: training tokens, `begin` included.
        first, last: value at the beginning, and the one that it approaches: the lower bound of inverse_sqrt and power.
        exponent: below 0 of power, above 0 of polynomial.
    """

    shape: str
    begin: int
    end: int
    first: float
    last: float
    exponent: float = 0.0

    def value_at(self, tokens: int) -> float:
        """The value after `tokens`, which are between `begin` and `end`."""
        if tokens <= self.begin:
            return self.first if self.shape != "constant" else self.last
        if tokens >= self.end and self.shape not in FOLLOW_TOKENS:
            return self.last
        return SHAPES[self.shape](self, tokens)

    @property
    def final(self) -> float:
        """The value at the end."""
        return self.value_at(self.end)


def _share(span: Span, tokens: int) -> float:
    return (tokens - span.begin) / (span.end - span.begin)


def _between(height: Callable[[float, float], float]) -> Callable[[Span, int], float]:
    """A shape that falls, or rises, from `first` at height 1 to `last` at height 0."""

    def value(span: Span, tokens: int) -> float:
        return span.last + (span.first - span.last) * height(_share(span, tokens), span.exponent)

    return value


def _exponential(span: Span, tokens: int) -> float:
    return span.first * math.pow(span.last / span.first, _share(span, tokens))


def _power(span: Span, tokens: int) -> float:
    return max(span.last, span.first * math.pow(tokens / span.begin, span.exponent))


def _inverse_sqrt(span: Span, tokens: int) -> float:
    return max(span.last, span.first * math.sqrt(span.begin / tokens))


SHAPES: Mapping[str, Callable[[Span, int], float]] = {
    "constant": lambda span, tokens: span.last,
    "linear": _between(lambda share, _: 1.0 - share),
    "cosine": _between(lambda share, _: 0.5 * (1.0 + math.cos(math.pi * share))),
    "1-sqrt": _between(lambda share, _: 1.0 - math.sqrt(share)),
    "exponential": _exponential,
    "polynomial": _between(lambda share, exponent: math.pow(1.0 - share, exponent)),
    "inverse_sqrt": _inverse_sqrt,
    "power": _power,
}
"""The value of a span inside of it. 1-sqrt is the decay of arXiv:2405.18392, power the schedule of arXiv:2408.13359,
inverse_sqrt that of Megatron-Core with tokens in place of steps."""
FOLLOW_TOKENS = ("inverse_sqrt", "power")
"""Shapes that continue by the tokens since the start of the run, and do not reach a value at their end."""


@dataclass(frozen=True)
class Schedule:
    """A number by the training tokens so far: spans end to end from token 0; behind the last one its final value.

    Raises:
        ValueError: there are none, or a span does not begin where the one before ends.
    """

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        begins = [span.begin for span in self.spans]
        ends = [span.end for span in self.spans]
        if not begins or begins != [0, *ends[:-1]] or any(b >= e for b, e in zip(begins, ends, strict=True)):
            raise ValueError(f"spans from {begins} to {ends} tokens do not follow one another from token 0 on")

    @staticmethod
    def constant(value: float) -> Schedule:
        """One value for the whole run."""
        return Schedule((Span("constant", 0, 1, value, value),))

    def value_at(self, tokens: int) -> float:
        """The value of the step that begins after `tokens` training tokens."""
        last = self.spans[-1]
        if tokens >= last.end:
            return last.final
        return self.spans[bisect_right(self.spans, tokens, key=lambda span: span.begin) - 1].value_at(tokens)

    @property
    def end(self) -> int:
        """Tokens at which the last span ends."""
        return self.spans[-1].end


@dataclass(frozen=True)
class BatchSegment:
    """A part of a run with one global batch size."""

    first_sample: int
    """Sequences trained before it."""
    batch_size: int
    """Sequences in one optimizer step, over all ranks."""


class BatchSchedule:
    """Global batch size by the sequences trained so far: segments, each from its data offset to the next one's.

    Raises:
        ValueError: the first segment does not begin at sample 0, or one is not a number of whole batches.
    """

    def __init__(self, segments: Sequence[BatchSegment]) -> None:
        self.segments = tuple(segments)
        if not self.segments or self.segments[0].first_sample != 0:
            raise ValueError("the first segment of a batch schedule begins at sample 0")
        for segment, following in zip(self.segments, self.segments[1:], strict=False):
            length = following.first_sample - segment.first_sample
            if length <= 0 or length % segment.batch_size:
                raise ValueError(f"{length} samples from {segment} on are not whole batches")
        self._starts = [segment.first_sample for segment in self.segments]

    @staticmethod
    def constant(batch_size: int) -> BatchSchedule:
        """One size for the whole run."""
        return BatchSchedule([BatchSegment(0, batch_size)])

    @staticmethod
    def from_schedule(schedule: Schedule, seq_length: int, multiple: int) -> BatchSchedule:
        """The batch sizes of a schedule of sequences by tokens, each rounded down to a multiple of `multiple`.

        A step has the size of the tokens before it, so a size that ends inside of a step ends with it.

        Args:
            seq_length: tokens in a sequence.

        Raises:
            ValueError: a size is below `multiple`, or there are more than `MOST_BATCH_SIZES`.
        """

        def size_at(sample: int) -> int:
            return math.floor(schedule.value_at(sample * seq_length) / multiple + 1e-9) * multiple

        def changes(size: int, sample: int) -> bool:
            return size_at(sample) != size

        # In each span a size rises or falls, so that the sample at which it changes is found by bisection.
        ends = [-(-span.end // seq_length) for span in schedule.spans]
        segments: list[BatchSegment] = []
        sample = 0
        while True:
            size = size_at(sample)
            if size < multiple:
                raise ValueError(f"{schedule.value_at(sample * seq_length):g} sequences are fewer than {multiple}")
            if not segments or segments[-1].batch_size != size:
                segments.append(BatchSegment(sample, size))
            if len(segments) > MOST_BATCH_SIZES:
                raise ValueError(f"it passes more than {MOST_BATCH_SIZES:,} batch sizes")
            if sample >= ends[-1]:
                return BatchSchedule(segments)
            end = ends[bisect_right(ends, sample)]
            change = sample + bisect_left(range(sample, end), True, key=partial(changes, size))
            sample += -(-(change - sample) // size) * size

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each segment."""
        return tuple(segment.batch_size for segment in self.segments)

    @property
    def last_size(self) -> int:
        """Size of the last segment, with which a run ends."""
        return self.segments[-1].batch_size

    def size_at(self, trained_samples: int) -> int:
        """Sequences in the step that begins after `trained_samples`."""
        return self.segments[self._index(trained_samples)].batch_size

    def samples_after(self, trained_samples: int, steps: int) -> int:
        """Sequences trained when `steps` more steps are done."""
        for size, count in self._parts(trained_samples):
            if count is None or steps <= count:
                return trained_samples + steps * size
            trained_samples, steps = trained_samples + count * size, steps - count
        raise AssertionError("the last part has no end")

    def steps_for(self, trained_samples: int, more_samples: int) -> int:
        """Steps after `trained_samples` that train at least `more_samples` more sequences."""
        steps = 0
        for size, count in self._parts(trained_samples):
            needed = -(-more_samples // size)
            if count is None or needed <= count:
                return steps + needed
            more_samples, steps = more_samples - count * size, steps + count
        raise AssertionError("the last part has no end")

    def _index(self, trained_samples: int) -> int:
        return bisect_right(self._starts, trained_samples) - 1

    def _parts(self, trained_samples: int) -> Iterator[tuple[int, int | None]]:
        """(size, steps) of the rest of the current segment, then of each later one; None: no end.

        A run that resumed with another schedule may be inside of a batch of this one, and end a segment late.
        """
        while True:
            index = self._index(trained_samples)
            size = self.segments[index].batch_size
            if index + 1 == len(self.segments):
                yield size, None
                return
            steps = -(-(self.segments[index + 1].first_sample - trained_samples) // size)
            yield size, steps
            trained_samples += steps * size
