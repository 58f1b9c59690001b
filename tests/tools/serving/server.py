"""A server in this process, on ranks that the tests of this package share."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.local.engine_ranks import EngineRanks
from moe_train.config.inference import EngineConfig, ServeConfig
from moe_train.inference import chat_template, protocol
from tools import serve, trained_model
from tools.serving.app import Service, build
from tools.serving.limits import Gate
from tools.serving.metrics import Metrics
from tools.serving.requests import Admission


@dataclass
class Loaded:
    """A model whose ranks run."""

    model: trained_model.TrainedModel
    config: EngineConfig
    ranks: EngineRanks
    facts: protocol.Ready


class Server:
    """One that runs."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port = service, port
        self.url = f"http://127.0.0.1:{port}"
        self.is_alive = True
        self.loop: asyncio.AbstractEventLoop | None = None
        self.has_loop = threading.Event()

    @property
    def load(self) -> protocol.Load:
        return self.service.ranks.load

    def tasks(self) -> int:
        """Tasks of the event loop that are not done."""
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(_count_tasks(), self.loop).result(10)

    @contextlib.contextmanager
    def without_slots(self, count: int) -> Iterator[None]:
        """So many requests are active inside the block, which do nothing."""
        assert self.loop is not None
        slots = [self.service.admission.slot() for _ in range(count)]
        for slot in slots:
            asyncio.run_coroutine_threadsafe(slot.__aenter__(), self.loop).result(10)
        try:
            yield
        finally:
            for slot in slots:
                asyncio.run_coroutine_threadsafe(slot.__aexit__(None, None, None), self.loop).result(10)


async def _count_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


@contextlib.contextmanager
def running(loaded: Loaded, token: str | None = None, **limits: Any) -> Iterator[Server]:
    """A server with these values of `serve`."""
    config = ServeConfig(port=0, **limits)
    admission = Admission(config.max_concurrent, config.max_queued)
    metrics = Metrics(lambda: loaded.ranks.load, loaded.facts.num_blocks)
    model = loaded.model
    service = Service(
        "test", loaded.ranks, loaded.facts, model.tokenizer, model.encode, model.stop_token_ids,
        chat_template.load(model.tokenizer), config, admission, metrics,
    )  # fmt: skip
    gate = Gate(build(service), token, config.max_body_bytes, metrics.count)
    with serve.listen(config) as listener:
        server = Server(service, listener.getsockname()[1])

        async def main() -> None:
            server.loop = asyncio.get_running_loop()
            server.has_loop.set()
            await serve.serve(gate, listener, admission, server, drain_s=5)

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        try:
            assert server.has_loop.wait(20)
            yield server
        finally:
            server.is_alive = False
            thread.join(20)
            assert not thread.is_alive()
