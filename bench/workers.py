"""Processes of a benchmark, one for each side: they take turns on the cores and never share a torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

Requests = dict[str, Callable[..., Any]]


class Worker:
    """A process that answers the requests which `prepare(*args)`, called in it, returns by name."""

    def __init__(self, prepare: Callable[..., Requests], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, args), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *args: Any) -> Any:
        """Result of a request.

        Raises:
            RuntimeError: the process failed; its own output says why.
        """
        self._pipe.send((what, args))
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process of the benchmark ended early; its error is printed above") from None

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(pipe: Any, prepare: Callable[..., Requests], args: tuple[Any, ...]) -> None:
    requests = prepare(*args)
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(requests[what](*arguments))
