"""When to speculate: draft tokens by multi-token prediction, and verify them in the next pass. No torch import.

Drafts do not change what is generated, up to rounding in 16 bits. They cost time: that of the multi-token-prediction
layers, and of more rows in the pass that verifies them. What they gain depends on how many are accepted. Both are
measured.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median_low

PLAIN_EVERY = 32
"""One in so many passes verifies no drafts, to measure what it costs without. Before the first decision it is one in
two."""
WARM_UP = 8
"""Passes before the first decision."""
PAUSE = 512
"""Passes without drafts after they did not pay off."""
_REMEMBERED = 32
"""Newest passes of each kind by which it is decided."""


@dataclass
class SpeculationStatistics:
    """How many drafts were verified and accepted, by depth: the first draft of a sequence has depth 0."""

    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def note(self, verified: int, accepted: int) -> None:
        """One sequence of one pass: the first `accepted` of `verified` drafts were right. A draft after a wrong one
        does not count."""
        counted = min(accepted + 1, verified)
        for counts, count in ((self.verified, counted), (self.accepted, accepted)):
            counts += [0] * (count - len(counts))
            for depth in range(count):
                counts[depth] += 1

    def rates(self) -> list[float]:
        """Share of the drafts that were accepted, of those whose predecessors were."""
        accepted = self.accepted + [0] * (len(self.verified) - len(self.accepted))
        return [own / total for own, total in zip(accepted, self.verified, strict=True)]


class _Passes:
    """What the newest passes of one kind took and gave."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._tokens: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, seconds: float, tokens: float) -> None:
        """`tokens`: of each sequence."""
        self._seconds.append(seconds)
        self._tokens.append(tokens)

    @property
    def seconds_per_token(self) -> float | None:
        """Of each sequence; None before the first pass. The median leaves out passes that were interrupted, or whose
        kernels were compiled."""
        return median_low(self._seconds) / fmean(self._tokens) if self._seconds else None


@dataclass
class _PassComparison:
    """Passes of about the same number of sequences, with and without drafts.

    Args:
        passes: since the last pause.
        paused: passes without drafts that are left.
    """

    passes: int = 0
    paused: int = 0
    speculative: _Passes = field(default_factory=_Passes)
    plain: _Passes = field(default_factory=_Passes)

    @property
    def is_slower(self) -> bool:
        """Whether drafts were measured to cost more than they gain."""
        speculative, plain = self.speculative.seconds_per_token, self.plain.seconds_per_token
        return speculative is not None and plain is not None and speculative > plain


class SpeculationControl:
    """Decides before each pass whether drafts are made and verified, the same on ranks with the same measurements.

    Passes are compared with those of as many sequences, up to a factor of two. It expects as many as in the last pass.
    """

    def __init__(self) -> None:
        self._comparisons: dict[int, _PassComparison] = {}
        self._now = self._comparison(1)

    @property
    def drafts(self) -> bool:
        """Whether the next pass makes drafts."""
        return not self._now.paused

    @property
    def verifies(self) -> bool:
        """Whether the next pass verifies the drafts that there are."""
        every = 2 if self._now.passes < WARM_UP else PLAIN_EVERY
        return self.drafts and self._now.passes % every != every - 1

    def note(self, verified: bool, seconds: float, drafting_s: float, sequences: int, tokens: int) -> None:
        """A pass has ended in which all sequences decode.

        Args:
            seconds: of the pass without making drafts.
            drafting_s: of making drafts.
            tokens: that the sequences have got.
        """
        self._now = self._comparison(sequences)
        self._now.passes += 1
        if verified:
            self._now.speculative.note(seconds + drafting_s, tokens / sequences)
        else:
            self._now.plain.note(seconds, 1)
        if self._now.passes >= WARM_UP and self._now.is_slower:
            self._comparisons[sequences.bit_length()] = self._now = _PassComparison(paused=PAUSE)

    def rest(self, sequences: int) -> None:
        """A pass without drafts has ended."""
        self._now = self._comparison(sequences)
        self._now.paused = max(self._now.paused - 1, 0)

    def _comparison(self, sequences: int) -> _PassComparison:
        return self._comparisons.setdefault(sequences.bit_length(), _PassComparison())
