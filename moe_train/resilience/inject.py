"""Faults that a drill injects: what they are, how they are written, and that each happens once in a run directory."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

KINDS = ("kill", "stop", "hang", "raise", "nan", "spike", "slow", "term")
_LEAST = {"rank": -1, "steps": 1, "samples": 1}


@dataclass(frozen=True)
class Fault:
    """One entry of `resilience.inject`, such as `kill:rank=1:step=7:at=end:after=0.05`.

    kill: SIGKILL. stop: SIGSTOP. hang: sleep without end. raise: an error of the code. nan, spike: the loss times NaN
    or `factor`. slow: `seconds` of sleep in the forward pass of each micro-batch. term: `factor` SIGTERMs and SIGUSR1s.
    """

    kind: str
    rank: int = -1
    """Which rank; -1 means all."""
    step: int = -1
    """Which step, from 1."""
    sample: int = -1
    """nan and spike: the data in which they are, from 0, whichever step uses it and however often."""
    samples: int = 1
    steps: int = 1
    """nan, spike and slow: how many steps."""
    at: str = "begin"
    """begin or end of the step; a checkpoint of the step is written after its end."""
    after: float = 0.0
    """kill and stop: seconds after that, while the run goes on."""
    seconds: float = 1.0
    factor: float = 100.0

    def due(self, rank: int, step: int, at: str) -> bool:
        """Whether it happens on `rank`, `at` the begin or end of `step`."""
        inside = self.step <= step < self.step + self.steps
        return self.rank in (-1, rank) and self.sample < 0 and self.at == at and inside

    def touches(self, rank: int, first: int, end: int) -> bool:
        """Whether it is in the samples from `first` to before `end`."""
        return self.rank in (-1, rank) and 0 <= self.sample < end and first < self.sample + self.samples


def parse(text: str) -> Fault:
    """The fault of one entry.

    Raises:
        ValueError: with what is wrong.
    """
    kind, *pairs = text.split(":")
    if kind not in KINDS:
        raise ValueError(f"{kind} is not one of {', '.join(KINDS)}")
    types = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Fault) if f.name != "kind"}
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name not in types or not equals:
            raise ValueError(f"{pair} is not one of {', '.join(f'{known}=' for known in types)}")
        try:
            values[name] = types[name](value)
        except ValueError:
            raise ValueError(f"{pair} is not a number") from None
    fault = Fault(kind, **values)
    if fault.at not in ("begin", "end"):
        raise ValueError(f"at={fault.at} is neither begin nor end")
    for name, least in _LEAST.items():
        if (number := getattr(fault, name)) < least:
            raise ValueError(f"{name}={number} is below {least}, so that it never happens")
    if (fault.step < 1) == (fault.sample < 0):
        raise ValueError("it needs step= (from 1), or with nan and spike sample=")
    if fault.sample >= 0 and kind not in ("nan", "spike"):
        raise ValueError(f"sample= is for nan and spike, not for {kind}")
    return fault


class Once:
    """Claims faults for this process, so that one that ended a run does not end it again."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._directory, self._rank = run_dir / "injected", rank
        self._left: dict[int, int] = {}

    def claim(self, number: int, times: int = 1) -> bool:
        """Whether fault `number` may happen now: at most `times` times in the process that was first."""
        if number not in self._left:
            self._directory.mkdir(parents=True, exist_ok=True)
            try:
                marker = os.open(self._directory / f"{number}_rank_{self._rank}", os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                self._left[number] = 0
            else:
                os.fsync(marker)
                os.close(marker)
                self._left[number] = times
        self._left[number] -= 1
        return self._left[number] >= 0
