"""Errors are one line, for files of any name."""

from __future__ import annotations

from parallel.errors import CheckpointError, ConfigError
from parallel.suggest import Impossible


def test_names_cannot_break_the_line_or_command_the_terminal() -> None:
    error = CheckpointError("a\nb\x1b[31m\u202ec\u00e9", "set d\r")
    assert str(error) == r"a\nb\x1b[31m\u202ecé; set d\r"
    again = CheckpointError(error.cause, error.remedy)
    assert str(again) == str(error)


def test_a_line_has_a_largest_length() -> None:
    assert len(CheckpointError("x" * 100_000, "y" * 100_000).cause) < 3000


def test_a_copy_for_other_ranks_keeps_its_class_and_its_words() -> None:
    class Damaged(CheckpointError):
        pass

    damaged = Damaged("a is damaged", "restore it").copied()
    assert (type(damaged), damaged.cause, damaged.remedy) == (Damaged, "a is damaged", "restore it")
    assert damaged.copied("make it again").remedy == "make it again"
    impossible = Impossible("model.topk=9 is too large", [{"model.topk": 8}]).copied()  # which takes other arguments
    assert (type(impossible), str(impossible)) == (ConfigError, "model.topk=9 is too large; use model.topk=8")
