"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moe_train.inference import protocol

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server.

    Args:
        load: the state of the engine.
        num_blocks: of the KV cache.
    """

    def __init__(self, load: Callable[[], protocol.Load], num_blocks: int) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "moe_requests", "Requests by path and status of HTTP.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("moe_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter("moe_completion_tokens", "Tokens that were generated.", registry=registry)
        self.seconds = Histogram(
            "moe_request_seconds", "Time from a request to the end of its answer.", registry=registry, buckets=_SECONDS
        )
        self.first_token_seconds = Histogram(
            "moe_first_token_seconds", "Time from a request to its first token.", registry=registry, buckets=_SECONDS
        )
        self._gauge("moe_running_sequences", "Sequences in the KV cache.", lambda: load().running)
        self._gauge("moe_waiting_sequences", "Sequences that wait for blocks.", lambda: load().waiting)
        self._gauge("moe_used_blocks", "Blocks of the KV cache in use.", lambda: load().used_blocks)
        self._gauge("moe_blocks", "Blocks of the KV cache.", lambda: num_blocks)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self._registry).set_function(value)

    def count(self, path: str, status: int) -> None:
        """Count an answer."""
        self.requests.labels(path, str(status)).inc()

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)
