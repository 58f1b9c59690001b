"""Fixtures of the tests of commands."""

from tests.checkpoint.hf.conftest import convert

__all__ = ["convert"]
