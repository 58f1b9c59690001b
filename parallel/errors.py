"""Errors typed by who must act. Commands print `cause; remedy` as one line, without a traceback."""

from __future__ import annotations

from parallel.exit_codes import ExitCode

_LONGEST = 2000


def one_line(text: str, longest: int = _LONGEST) -> str:
    """`text` without line breaks and terminal controls, which names in files can have, and of a readable length."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


class MoeTrainError(Exception):
    """Base of every error a command explains in one line.

    Args:
        cause: the problem, with the field, file or rank.
        remedy: what to do about it, with values that would work.
    """

    exit_code: int = ExitCode.FAILED

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause, self.remedy = one_line(cause), one_line(remedy)
        super().__init__(f"{self.cause}; {self.remedy}" if remedy else self.cause)

    def copied(self, remedy: str | None = None) -> MoeTrainError:
        """The same error without its traceback, for other ranks. `remedy` replaces its own.

        A subclass with other arguments becomes the class that it specialises.
        """
        kind = next(kind for kind in type(self).__mro__ if kind.__init__ is MoeTrainError.__init__)  # type: ignore[misc]
        copy: MoeTrainError = kind(self.cause, self.remedy if remedy is None else remedy)
        return copy


class ConfigError(MoeTrainError):
    """The configuration asks for something impossible: the user who typed the command acts."""

    exit_code = ExitCode.WRONG_INPUT


class DataError(MoeTrainError):
    """A corpus, tokenizer or dataset file is missing, empty or damaged: the user who prepared the data acts."""

    exit_code = ExitCode.WRONG_INPUT


class CheckpointError(MoeTrainError):
    """A checkpoint is missing, incomplete or does not fit the model: the user who named it acts."""

    exit_code = ExitCode.WRONG_INPUT


class LaunchError(MoeTrainError):
    """Ranks could not be started, could not meet, or one of them failed: the user who launched the job acts."""


class HardwareError(MoeTrainError):
    """This machine lacks or lost what the run needs (GPU, memory, library): the owner of the machine acts. Starting
    again on the same machine changes nothing."""

    exit_code = ExitCode.BAD_NODE
