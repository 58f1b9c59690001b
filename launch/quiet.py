"""Keeps notices that a user can do nothing about off the terminal. Errors are never touched."""

from __future__ import annotations

import os
import warnings

# Megatron-Core and torch warn once for each optional package that is absent, in every rank.
NOTICES = (
    r".*Transformer Engine and Apex are not installed.*",
    r".*Apex is not installed.*",
    r".*Transformer Engine is not installed.*",
    r".*The \.grad attribute of a Tensor that is not a leaf Tensor.*",
    r".*full scope is deprecated.*",
    r".*destroy_process_group\(\) was not called.*",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed.*",  # it is only asked for
    r".*`torch\.jit\.script(_method)?` is deprecated.*",
)


def silence() -> None:
    """Filter the notices of libraries in this process. Call it before they are imported."""
    # torch's C++ side warns about every retry of a socket while ranks are still starting.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)(\..*)?")
