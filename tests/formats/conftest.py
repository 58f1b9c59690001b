"""Fixtures of tests/conversion that tests of file formats use too."""

from __future__ import annotations

from tests.conversion.conftest import convert

__all__ = ["convert"]
