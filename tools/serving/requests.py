"""Requests of HTTP clients to the engine: admission, time limits, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from launch.local.engine_ranks import EngineRanks, Event, Lost
from moe_train.config.inference import ServeConfig
from moe_train.inference import protocol
from tools.serving.errors import RequestError
from tools.serving.metrics import Metrics


class Admission:
    """At most so many requests generate at the same time, and at most so many more wait for that."""

    def __init__(self, max_concurrent: int, max_queued: int) -> None:
        self._slots = asyncio.Semaphore(max_concurrent)
        self._max_queued = max_queued
        self.active = self.queued = 0
        self.draining = False

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A turn to generate.

        Raises:
            RequestError: too many requests wait already, or the server is shutting down.
        """
        if self.draining:
            raise RequestError(503, "the server is shutting down")
        if self._slots.locked() and self.queued >= self._max_queued:
            raise RequestError(429, f"the queue is full (serve.max_queued={self._max_queued}); try again later")
        self.queued += 1
        try:
            await self._slots.acquire()
        finally:
            self.queued -= 1
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._slots.release()


class Generation:
    """One HTTP request: the prompts that it submits to the engine, and their events in the order in which they come.

    Use it as an asynchronous context manager: what has not finished at the end of the block is cancelled.
    """

    def __init__(self, ranks: EngineRanks, limits: ServeConfig, admission: Admission, metrics: Metrics) -> None:
        self._ranks, self._limits, self._admission, self._metrics = ranks, limits, admission, metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._running: dict[int, int] = {}  # number of the engine by position of the prompt
        self._exit = contextlib.AsyncExitStack()
        self._started = time.monotonic()
        self._saw_token = False
        self.completion_tokens = 0

    async def __aenter__(self) -> Generation:
        await self._exit.enter_async_context(self._admission.slot())
        return self

    async def __aexit__(self, *_: object) -> None:
        for number in self._running.values():
            self._ranks.cancel(number)
        self._running.clear()
        await self._exit.aclose()
        self._metrics.seconds.observe(time.monotonic() - self._started)

    def submit(self, prompts: Sequence[Sequence[int]], params: dict[str, Any], stop: Sequence[str]) -> None:
        """Queue all prompts."""
        loop = asyncio.get_running_loop()
        self._metrics.prompt_tokens.inc(sum(map(len, prompts)))
        for position, prompt in enumerate(prompts):

            def deliver(event: Event, own: int = position) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._events.put_nowait, (own, event))

            self._running[position] = self._ranks.submit(prompt, params, stop, deliver)

    async def events(self) -> AsyncIterator[tuple[int, protocol.Update | protocol.Finished]]:
        """Position of the prompt, and what has happened, until all prompts have finished.

        Raises:
            RequestError: the engine refuses a prompt, or the ranks have ended.
        """
        while self._running:
            position, event = await self._events.get()
            if isinstance(event, Lost):
                self._running.pop(position, None)
                raise RequestError(503, "the model is not running any more")
            if isinstance(event, protocol.Rejected):
                self._running.pop(position, None)
                raise RequestError(400, f"{event.cause}; {event.remedy}")
            if isinstance(event, protocol.Finished):
                self._running.pop(position, None)
            else:
                self._count(event)
            yield position, event

    def _count(self, update: protocol.Update) -> None:
        if not self._saw_token:
            self._saw_token = True
            self._metrics.first_token_seconds.observe(time.monotonic() - self._started)
        self.completion_tokens += len(update.tokens)
        self._metrics.completion_tokens.inc(len(update.tokens))
