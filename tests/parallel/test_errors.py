"""Errors are one line, for files of any name."""

from __future__ import annotations

from parallel.errors import CheckpointError


def test_names_cannot_break_the_line_or_command_the_terminal() -> None:
    error = CheckpointError("a\nb\x1b[31m\u202ec\u00e9", "set d\r")
    assert str(error) == r"a\nb\x1b[31m\u202ecé; set d\r"
    again = CheckpointError(error.cause, error.remedy)
    assert str(again) == str(error)


def test_a_line_has_a_largest_length() -> None:
    assert len(CheckpointError("x" * 100_000, "y" * 100_000).cause) < 3000
