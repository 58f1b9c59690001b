"""Fixtures of the tests of commands."""

from tests.conversion.conftest import convert

__all__ = ["convert"]
