"""Exit codes of every command and of every rank. No torch import.

`launch/train.sbatch` and the table in docs/slurm.md repeat them; tests/test_exit_codes.py compares all three.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of a process means for its launcher. A process that signal N ended has 128 + N."""

    DONE = 0
    FAILED = 1
    """A rank, a library or a node failed; starting again may help."""
    WRONG_INPUT = 2
    """The configuration, the data or a checkpoint is wrong; starting again changes nothing."""
    BAD_NODE = 3
    """A node lacks what the run needs, or is slow; starting again on the same nodes changes nothing."""
    HUNG = 4
    """A rank made no progress and ended itself; starting again may help."""
    DIVERGED = 5
    """Loss or gradients stay bad after every attempt; starting again changes nothing."""
    SAVED = 75
    """A stop was requested, and the run saved: EX_TEMPFAIL of sysexits.h. The same command continues it."""
    INTERRUPTED = 130
    """Ctrl-C: 128 + SIGINT."""


NOT_RETRIED = frozenset({ExitCode.WRONG_INPUT, ExitCode.BAD_NODE, ExitCode.DIVERGED})
"""After these the ranks are not started again on the same nodes."""

COLLECTIVE = frozenset({ExitCode.BAD_NODE, ExitCode.SAVED})
"""With these all ranks end together and on purpose: a node is bad or slow, or a signal asked to stop."""
