"""Megatron-Core imported without `torch.compile`, for processes that run on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_compilation() -> Iterator[None]:
    """Modules that are imported inside keep the functions that they would compile.

    On a CPU nothing is compiled (`parallel.runtime.cpu.prepare`), but `torch.compile` imports the whole of Inductor as
    soon as it decorates a function: 1.0 of the 4.0 s of processor time that these imports take (Zen 4).

    Upstream: core/jit.py sets `jit_fuser = torch.compile`, which core/fusions and others apply while they are imported;
    `disable_jit_fuser` comes too late, since importing core/jit.py imports them first. Remove it when upstream decides
    at the first call.
    """
    compiled = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled


def _unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`torch.compile` as a decorator, with and without options, that compiles nothing."""
    return function if function is not None else _unchanged
