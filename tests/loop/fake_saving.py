"""A checkpoint that is not written, for the tests of callbacks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from moe_train.run import Run
from parallel.errors import CheckpointError


class FakeSaving:
    """A checkpoint that is on its way for `steps` steps, and may fail then."""

    def __init__(self, run: Run, copy: bool, steps: int, error: bool) -> None:
        self.job = SimpleNamespace(step=run.state.step, final=run.run_dir, bytes=2_000_000)
        self.copy, self.steps, self.error, self.seconds = copy, steps, error, 0.5
        self.waited, self.abandoned = False, False

    def advance(self) -> bool:
        self.steps -= 1
        if self.steps <= 0 and self.error:
            raise CheckpointError("cannot write", "free space")
        return self.steps <= 0

    def wait(self) -> Path:
        self.waited, self.steps = True, 0
        self.advance()
        return self.job.final

    def abandon(self) -> None:
        self.abandoned = True
