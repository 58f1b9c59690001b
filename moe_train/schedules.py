"""Settings that depend on the progress of a run. No torch import.

The global batch size is a function of the sequences trained so far, so that a run that resumes, in any layout, makes
the same batches of the same samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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
