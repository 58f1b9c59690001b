"""Fixtures of the tests of conversion."""

from __future__ import annotations

import pytest

from tests.conversion.tiny_v3 import Command


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`moe-convert` inside this process."""
    return Command(monkeypatch, capsys)
