"""Signals become one exception, at a time when the code can clean up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event

import pytest

from launch.local import signals


def _sleep(running: Event) -> None:
    running.set()
    time.sleep(60)


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_signal_ends_what_this_process_has_started(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    context = multiprocessing.get_context("spawn")  # this process may have threads of libraries by now
    running = context.Event()
    child = context.Process(target=_sleep, args=(running,))

    def work() -> None:
        with signals.interruptible():
            child.start()
            assert running.wait(60)
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(signals.Interrupted) as caught:
        work()
    child.join(5)
    assert child.exitcode == -signal.SIGTERM
    assert (caught.value.signal, caught.value.exit_code) == (number, 128 + number)
    assert signal.getsignal(number) == before


def to_this_thread(number: signal.Signals) -> None:
    """It stays with this thread, which has blocked it."""
    signal.pthread_kill(threading.get_ident(), number)


def to_another_thread(number: signal.Signals) -> None:
    """Libraries start threads that block nothing; Python's handler then runs here all the same."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ENDING), done.wait()))
    thread.start()
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, number)
    deadline = time.monotonic() + 60
    while not signals._pending and time.monotonic() < deadline:
        time.sleep(0.001)
    done.set()
    thread.join()


@pytest.mark.parametrize("send", [to_this_thread, to_another_thread])
def test_a_signal_waits_for_the_end_of_what_must_not_be_torn_apart(send: Callable[[signal.Signals], None]) -> None:
    steps = []

    def work() -> None:
        with signals.interruptible():
            with signals.deferred():
                send(signal.SIGTERM)
                with signals.deferred():
                    steps.append("inner")
                steps.append("outer")
            steps.append("never")

    with pytest.raises(signals.Interrupted):
        work()
    assert steps == ["inner", "outer"]


def test_no_exception_handler_on_the_way_takes_an_interruption_for_a_failure() -> None:
    assert not issubclass(signals.Interrupted, Exception)
