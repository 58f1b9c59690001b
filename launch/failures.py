"""What a failed rank leaves behind, which of several failures came first, and the one line that tells it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_train.files import atomic, untrusted
from moe_train.resilience import watch
from parallel import errors
from parallel.errors import HardwareError, LaunchError, MoeTrainError
from parallel.exit_codes import COLLECTIVE, NOT_RETRIED, ExitCode

# What gloo, NCCL and the store say in a healthy rank when another one is gone or late.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by (remote )?peer|broken pipe|socket (closed|timeout)"
    r"|failed to (recv|send|connect)|timed out (waiting|after)|remote process (exited|has terminated)"
    r"|operation timeout|ncclRemoteError|ncclSystemError|wait timeout|store.*(closed|gone)",
    re.IGNORECASE,
)

LEFT = "MOE_EXIT_CODE"
"""Set by `train.sbatch`: the file in which a rank leaves an exit code that says what to do next."""

_SIGNAL_CAUSES = {
    "SIGKILL": "most often it was out of memory: see `dmesg`, lower batch.micro_batch_size or train.seq_length, "
    "or spread the model over more ranks (parallel.tp, parallel.pp, parallel.ep)",
    "SIGTERM": "something outside this job ended it",
    "SIGBUS": "shared memory or disk was full, see `df /dev/shm`",
}


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    rank: int
    message: str
    """One line."""
    exit_code: int
    """Of the process as a whole: 2 for wrong input, 3 where the machine lacks something, 4 and 5 where ranks hung or
    diverged, else 1."""
    traceback: str
    order: tuple[int, float]
    """The smallest is the cause of the others."""

    @property
    def is_cause(self) -> bool:
        """Whether no other rank can have caused this failure."""
        return self.order[0] <= 1

    @property
    def agreed(self) -> bool:
        """Whether all ranks ended like this, on purpose, so that there is no error to tell."""
        return self.exit_code in COLLECTIVE and not self.traceback


class RankError(LaunchError):
    """One rank failed and took the others with it. Carries that rank's exit code and traceback."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.exit_code = failure.exit_code
        self.rank, self.traceback = failure.rank, failure.traceback
        if failure.traceback:
            self.add_note(f"\nIn rank {failure.rank}:\n{failure.traceback}")  # shown below the launcher's own traceback


def lacking(error: ImportError) -> HardwareError:
    """What a missing package, or one of a wrong version, means for this node."""
    return HardwareError(
        f"{type(error).__name__} on {socket.gethostname()}: {str(error).strip().partition(chr(10))[0]}",
        f"give {sys.executable} on this node the packages that the others have",
    )


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """Raise HardwareError for an ImportError in this block."""
    try:
        yield
    except ImportError as error:
        raise lacking(error) from error


def one_line(error: BaseException) -> str:
    """`error` without a traceback: typed errors in full, others as `Type: first line`."""
    error = lacking(error) if isinstance(error, ImportError) else error
    if isinstance(error, MoeTrainError):
        return " ".join(str(error).split())
    text = errors.one_line(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def lost_peer(error: BaseException) -> bool:
    """Whether `error` only says that another rank is gone."""
    return any(isinstance(e, RuntimeError | OSError | EOFError) and _LOST_PEER.search(str(e)) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def exit_code_of(error: BaseException) -> int:
    """2 where the user's input is wrong, 3 where the machine lacks something, else 1 or the error's own."""
    error = lacking(error) if isinstance(error, ImportError) else error
    return error.exit_code if isinstance(error, MoeTrainError) else 1


def leave_code(code: int) -> None:
    """Leave the exit code of this rank for the batch script, where it says more than that a rank failed.

    The launcher may tell another: under NCCL healthy ranks wait for the failed one until they are killed, and srun then
    ends with the code of a kill; torchrun always ends with 1.
    """
    if LEFT in os.environ and code in NOT_RETRIED | COLLECTIVE:
        with contextlib.suppress(OSError), open(os.environ[LEFT], "x", encoding="utf-8") as file:  # the first one's
            file.write(f"{code}\n")


def record(error: BaseException, error_file: str) -> None:
    """Leave `error` for the parent, in torch elastic's format of error files with a few more keys."""
    extra = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
    data = {
        "message": {"message": one_line(error), "extraInfo": extra},
        "time_s": time.monotonic(),  # one clock for all processes of a machine, and nobody sets it
        "exit_code": exit_code_of(error),
        "explained": isinstance(error, MoeTrainError | ImportError),
        "lost_peer": lost_peer(error),
    }
    atomic.write_text(Path(error_file), json.dumps(data))  # the parent may read at any time


def read(rank: int, exit_status: int, error_file: str, log: str) -> Failure:
    """The failure of a rank from its exit status (-N for signal N) and the error file it may have left."""
    try:
        data = untrusted.read_object(Path(error_file))
        message, trace = str(data["message"]["message"]), str(data["message"]["extraInfo"]["py_callstack"])
        if not data["explained"]:
            message += f" (traceback in {log}; verbose=true shows it)"
        order = (3 if data["lost_peer"] else 0, float(data["time_s"]))
        return Failure(rank, f"rank {rank}: {message}", int(data["exit_code"]), trace, order)
    except (OSError, ValueError, KeyError, TypeError):
        return _without_record(rank, exit_status, log)


def _without_record(rank: int, exit_status: int, log: str) -> Failure:
    now = time.monotonic()
    if exit_status in COLLECTIVE:  # of several ranks, any other failure explains more
        return Failure(rank, f"rank {rank} ended with exit code {exit_status}", exit_status, "", (4, now))
    if exit_status == ExitCode.HUNG:
        return Failure(rank, _hung(rank, Path(log)), exit_status, "", (1, now))
    if exit_status >= 0:
        return Failure(rank, f"rank {rank} ended with exit code {exit_status} and no error; see {log}", 1, "", (1, now))
    try:
        name = signal.Signals(-exit_status).name
    except ValueError:
        name = f"signal {-exit_status}"
    why = _SIGNAL_CAUSES.get(name, f"native code crashed, see {log}")
    # Communication libraries abort a healthy process when its peer is gone, so another rank may explain this better,
    # but not one that only says that it lost a peer.
    order = (2 if name == "SIGABRT" else 1, now)
    return Failure(rank, f"rank {rank} was killed by {name}; {why}", 1, "", order)


def _hung(rank: int, log: Path) -> str:
    """Which rank made no progress, as the one that ended itself found out."""
    try:
        verdict = "; ".join((log.parent.parent / watch.VERDICT).read_text(encoding="utf-8").splitlines())
    except OSError:
        verdict = f"rank {rank} made no progress"
    return f"{verdict} (stacks in {log.parent}/hang_rank_N.txt)"
