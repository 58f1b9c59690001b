"""A scheduler's wish that the run end soon: a signal notes it, and the loop ends after a step with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from parallel.exit_codes import ExitCode

_asked: list[str] = []


class Stopped(SystemExit):
    """The run ends early, as asked, with everything saved. No Exception: nothing failed."""

    def __init__(self) -> None:
        super().__init__(ExitCode.SAVED)


def listen(*numbers: signal.Signals) -> None:
    """From now on these signals only note the wish, however often they come. In the main thread; else no effect."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, note)


def note(number: int, frame: FrameType | None = None) -> None:
    """Note that this signal asked this process to stop."""
    _asked.append(signal.Signals(number).name)


def asked() -> str:
    """Name of the first signal that asked this process to stop; "" if none has."""
    return _asked[0] if _asked else ""


def forget() -> None:
    """Take back the wish, for tests that run several jobs in one process."""
    _asked.clear()
