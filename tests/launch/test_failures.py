"""Which of several failures is told, and how."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

from launch import failures
from parallel.errors import CheckpointError, ConfigError
from parallel.exit_codes import ExitCode


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31010",
        "Read error [127.0.0.1]:1: Connection reset by peer",
        "writev [127.0.0.1]:1: Broken pipe",
        "Timed out waiting 600000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
        "failed to recv, got 0 bytes",
    ],
)
def test_errors_of_a_rank_that_lost_another(text: str) -> None:
    assert failures.lost_peer(RuntimeError(text))


@pytest.mark.parametrize("error", [ValueError("Connection closed by peer"), RuntimeError("shapes differ"), KeyError()])
def test_errors_of_a_rank_itself(error: Exception) -> None:
    assert not failures.lost_peer(error)


def test_an_error_that_a_lost_peer_caused_is_one_too() -> None:
    error = CheckpointError("cannot save", "try again")
    error.__cause__ = RuntimeError("Connection closed by peer")
    assert failures.lost_peer(error)


def test_an_error_raised_while_another_one_is_handled_has_the_same_cause() -> None:
    """Unless it was raised `from None`, which says that the other one explains nothing."""

    def fails(hidden: bool) -> None:
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError:
            if hidden:
                raise ValueError("wrong") from None
            raise ValueError("wrong")  # noqa: B904 - the context is what is tested

    for hidden in (False, True):
        with pytest.raises(ValueError, match="wrong") as error:
            fails(hidden)
        assert failures.lost_peer(error.value) != hidden


def _recorded(tmp_path: Path, rank: int, error: Exception) -> failures.Failure:
    path = str(tmp_path / f"{rank}.json")
    failures.record(error, path)
    return failures.read(rank, 1, path, "rank.log")


def test_a_typed_error_keeps_its_text_and_exit_code(tmp_path: Path) -> None:
    failure = _recorded(tmp_path, 3, ConfigError("seed=0\nis odd", "set seed=1"))
    assert failure.message == "rank 3: seed=0\\nis odd; set seed=1"
    assert failures.RankError(failure).exit_code == 2


def test_an_unexpected_error_is_one_line_and_says_where_its_traceback_is(tmp_path: Path) -> None:
    failure = _recorded(tmp_path, 3, ValueError("wrong\nand more"))
    assert failure.message == "rank 3: ValueError: wrong (traceback in rank.log; verbose=true shows it)"
    assert failure.exit_code == 1
    assert "ValueError: wrong\nand more" in failure.traceback


def test_the_cause_comes_before_its_consequences_whatever_the_order_in_time(tmp_path: Path) -> None:
    lost = _recorded(tmp_path, 0, RuntimeError("Connection closed by peer"))
    aborted = failures.read(1, -signal.SIGABRT, "none", "rank_1.log")
    killed = failures.read(2, -signal.SIGKILL, "none", "rank_2.log")
    cause = _recorded(tmp_path, 3, ValueError("wrong"))
    later = _recorded(tmp_path, 4, ValueError("wrong too"))
    ranks = [failure.rank for failure in sorted([lost, aborted, killed, later, cause], key=lambda f: f.order)]
    assert ranks == [3, 4, 2, 1, 0]
    assert [f.is_cause for f in (lost, aborted, killed, cause)] == [False, False, True, True]


def test_a_rank_that_ended_without_a_word_is_a_cause(tmp_path: Path) -> None:
    """Before ranks that were aborted or lost a peer, and before those that ended on purpose."""
    agreed = failures.read(0, ExitCode.BAD_NODE, "none", "log")
    lost = _recorded(tmp_path, 1, RuntimeError("Connection closed by peer"))
    aborted = failures.read(2, -signal.SIGABRT, "none", "log")
    silent, hung = failures.read(3, 7, "none", "log"), failures.read(4, ExitCode.HUNG, "none", "log")
    assert [one.rank for one in sorted([agreed, lost, aborted, silent, hung], key=lambda f: f.order)] == [3, 4, 2, 1, 0]
    assert [one.is_cause for one in (silent, hung, aborted, lost, agreed)] == [True, True, False, False, False]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"message": "text", "time_s": 1}'])
def test_a_damaged_record_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text(text)
    assert failures.read(2, 7, str(tmp_path / "error.json"), "l") == replace(
        failures.read(2, 7, "none", "l"), order=ANY
    )


def test_an_error_cannot_control_the_terminal() -> None:
    assert failures.one_line(ValueError("a\x1b[2J\nb")) == r"ValueError: a\x1b[2J"


def test_a_rank_that_left_nothing() -> None:
    assert "rank 2 was killed by SIGKILL; most often it was out of memory" in failures.read(2, -9, "none", "l").message
    assert "crashed, see l" in failures.read(2, -signal.SIGSEGV, "none", "l").message
    assert failures.read(2, 7, "none", "l").message == "rank 2 ended with exit code 7 and no error; see l"
