"""Signals become one exception, at a time when the code can clean up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

import pytest

from launch import signals


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


def test_a_signal_waits_for_the_end_of_what_must_not_be_torn_apart() -> None:
    steps = []

    def work() -> None:
        with signals.interruptible():
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                with signals.deferred():
                    steps.append("inner")
                steps.append("outer")
            steps.append("never")

    with pytest.raises(signals.Interrupted):
        work()
    assert steps == ["inner", "outer"]


def test_no_exception_handler_on_the_way_takes_an_interruption_for_a_failure() -> None:
    assert not issubclass(signals.Interrupted, Exception)
