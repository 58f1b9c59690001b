"""Formats of numbers in files, with the names and properties of torch.dtype. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """A format of numbers."""

    name: str
    itemsize: int
    is_floating_point: bool = True

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name  # pickled by name, as torch's are

    @property
    def torch(self) -> torch.dtype:
        """The same for torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


DTYPES = {
    dtype.name: dtype
    for dtype in (
        *(Dtype(f"float8_{name}", 1) for name in ("e4m3fn", "e5m2", "e8m0fnu", "e4m3fnuz", "e5m2fnuz")),
        *(Dtype(name, size) for name, size in (("float64", 8), ("float32", 4), ("bfloat16", 2), ("float16", 2))),
        *(Dtype(f"{sign}int{8 * size}", size, False) for sign in ("", "u") for size in (1, 2, 4, 8)),
        *(Dtype(f"complex{8 * size}", size, False) for size in (4, 8, 16)),
        Dtype("bool", 1, False),
    )
}
"""Every format by its name."""


def of_torch(dtype: torch.dtype) -> Dtype:
    """The format of a tensor."""
    return DTYPES[str(dtype).removeprefix("torch.")]


def __getattr__(name: str) -> Dtype:
    """Pickle looks for a format by its name in this module."""
    if name in DTYPES:
        return DTYPES[name]
    raise AttributeError(name)
