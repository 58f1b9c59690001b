"""How patches are applied: each is one function that replaces attributes, and only in this folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

Replace = Callable[[Any, str, Any], None]
Patch = Callable[[torch.device, Replace], None]

_applied: set[str] = set()


def apply(patches: Iterable[Patch], device: torch.device, skip: Collection[str] = ()) -> None:
    """Apply each patch once in this process. `skip` names patches to leave out, which only the tests of them do."""
    for patch in patches:
        if patch.__name__ not in _applied and patch.__name__ not in skip:
            patch(device, setattr)
            _applied.add(patch.__name__)
