"""Cooperative stop (Megatron-LM's exit signal handler): a signal sets a flag, which the loop checks after each step.
It then saves and exits."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from parallel.exit_codes import ExitCode

_requests: list[str] = []


class Stopped(SystemExit):
    """The run ends early on request, with a checkpoint. Not an Exception, because nothing failed."""

    def __init__(self) -> None:
        super().__init__(ExitCode.SAVED)


def listen(*numbers: signal.Signals) -> None:
    """Install the handler for these signals; repeated signals have no further effect. Only in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, request)


def request(number: int, frame: FrameType | None = None) -> None:
    """Signal handler: record the stop request."""
    _requests.append(signal.Signals(number).name)


def requested_by() -> str:
    """Name of the first signal that requested a stop; "" if there was none."""
    return _requests[0] if _requests else ""


def reset() -> None:
    """Clear the stop request, for tests that run several jobs in one process."""
    _requests.clear()
