"""Which cases of a long list `make test` runs; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Parameters for `cases`, all but those in `quick` marked slow. Every name in `quick` must be a case.

    Args:
        name: the id of a case.
    """
    quick, cases = list(quick), list(cases)
    if unknown := [case for case in quick if case not in cases]:
        raise ValueError(f"{unknown} are not among the cases")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name(case),
                     marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]  # fmt: skip
