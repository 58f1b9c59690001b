"""Exponential moving average of the weights, in fp32 in host memory. Each rank has that of its own weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from moe_train.config.optimizer import OptimizerConfig


def decay_of(options: OptimizerConfig, tokens: int) -> float:
    """The decay of the average in a step of `tokens`: that of each step, or by the half-life."""
    if options.ema_half_life_tokens is not None:
        return float(0.5 ** (tokens / options.ema_half_life_tokens))
    if options.ema_decay is None:
        raise ValueError("neither ema_decay nor ema_half_life_tokens is set")
    return options.ema_decay


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, beginning with the initial weights.

    `start` returns at once. A thread computes while the next forward and backward passes run, and `wait` joins it
    before weights change. From a GPU the weights are first copied to pinned memory, on a stream of their own.

    Args:
        chunks: of this rank, with DDP around them.
        gathers_late: whether weights are complete only in the next forward pass (`parallel.overlap_param_gather`).
    """

    def __init__(self, chunks: Sequence[Any], options: OptimizerConfig, gathers_late: bool = False) -> None:
        self._chunks, self._options, self._gathers_late = chunks, options, gathers_late
        self._parameters = [p for chunk in unwrap_model(list(chunks)) for p in chunk.parameters()]
        self._averages = [_on_host(p).float() for p in self._parameters]
        self._staged: list[Tensor] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-average")
        self._running: Future[None] | None = None

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> its average, after what is running."""
        self.wait()
        return dict(zip(self._parameters, self._averages, strict=True))

    def reset(self) -> None:
        """Begin again with the current weights."""
        self.wait()
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.copy_(parameter.detach())

    def start(self, tokens: int) -> None:
        """Take the weights after a step of `tokens` into the average."""
        self.wait()
        self._gather()
        share = 1 - decay_of(self._options, tokens)
        copied = self._stage()
        self._running = self._thread.submit(self._update, share, copied)

    def wait(self) -> None:
        """Until the average is up to date. Weights must not change before."""
        if self._running is not None:
            self._running.result()
            self._running = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The average as the weights of the model, which come back afterwards."""
        averages = self.averages
        self._gather()
        with torch.no_grad():
            before = [_on_host(p) for p in self._parameters]
            for parameter, average in averages.items():
                parameter.copy_(average)
            try:
                yield
            finally:
                for parameter, weight in zip(self._parameters, before, strict=True):
                    parameter.copy_(weight)

    def _gather(self) -> None:
        if self._gathers_late:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def _stage(self) -> torch.cuda.Event | None:
        """Where the weights are to be read, `_staged`; from a GPU once the event has happened."""
        if not self._parameters or not self._parameters[0].is_cuda:
            self._staged = [p.detach() for p in self._parameters]
            return None
        if not self._staged:
            self._staged = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in self._parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for staged, parameter in zip(self._staged, self._parameters, strict=True):
                staged.copy_(parameter.detach(), non_blocking=True)
        return stream.record_event()

    @torch.no_grad()
    def _update(self, share: float, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for average, weight in zip(self._averages, self._staged, strict=True):
            average.lerp_(weight.float(), share)


def _on_host(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True)
