"""A signal that asks a run to stop is noted, and nothing else happens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_train.resilience import stop

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts back what was there before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop.reset()


def test_the_first_of_several_signals_is_named() -> None:
    stop.listen(*SIGNALS)
    assert stop.requested_by() == ""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.requested_by() == "SIGTERM"
    stop.reset()
    assert stop.requested_by() == ""


def test_a_run_that_stops_is_no_failure() -> None:
    """No handler of failures may take it for one, and its exit code asks for another start."""
    assert stop.Stopped().code == os.EX_TEMPFAIL
    assert not issubclass(stop.Stopped, Exception)


def test_outside_the_main_thread_handlers_stay() -> None:
    """Python allows no handler there: a run in a thread goes on without."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop.listen, *SIGNALS).result()
    assert [signal.getsignal(number) for number in SIGNALS] == before
