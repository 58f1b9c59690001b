"""What all ranks do together with storage: an error of one is raised by every one, so that none waits for another."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moe_train.ranks import RankContext
from parallel.errors import CheckpointError, MoeTrainError, one_line

T = TypeVar("T")

REMEDY = "check free space and permissions, or set checkpoint.dir"
LIMITS = "raise the limits on memory and processes: ulimit -v, ulimit -u, or those of the batch job's cgroup"
_NO_THREAD = "can't start new thread"


@dataclass(frozen=True)
class ActionResult:
    """The return value of an action, or its error."""

    value: Any = None
    error: MoeTrainError | None = None


def on_main(ranks: RankContext, action: Callable[[], T], description: str) -> T:
    """Result of `action` on the first rank, or its error, on every rank."""
    shared = [attempt(action, description) if ranks.is_main else ActionResult()]
    dist.broadcast_object_list(shared, src=0)
    return _value(shared[0])


def on_all_ranks(ranks: RankContext, action: Callable[[], T], description: str) -> T:
    """Result of `action`, which every rank does. If it fails on any rank, every rank raises the first one's error."""
    outcome = attempt(action, description)
    errors: list[MoeTrainError | None] = [None] * ranks.layout.world_size
    dist.all_gather_object(errors, outcome.error)
    _raise_first(errors)
    return _value(outcome)


def gathered(ranks: RankContext, outcome: ActionResult) -> list[Any]:
    """The values of the outcomes of all ranks, on the first rank; elsewhere none. Every rank raises the first error."""
    outcomes: list[ActionResult] = [ActionResult()] * ranks.layout.world_size
    dist.gather_object(outcome, outcomes if ranks.is_main else None)
    shared = [[result.error for result in outcomes if result.error is not None][:1]]
    dist.broadcast_object_list(shared, src=0)
    _raise_first(shared[0])
    return [result.value for result in outcomes] if ranks.is_main else []


def attempt(action: Callable[[], Any], description: str) -> ActionResult:
    """Do `action` and keep its error, if it is one of storage. Other errors are bugs and pass through."""
    try:
        return ActionResult(action())
    except CheckpointError as error:
        return ActionResult(error=error.copied())
    except OSError as error:
        return ActionResult(error=CheckpointError(f"cannot {description}: {error.strerror or error}", REMEDY))
    except MemoryError:
        return ActionResult(error=CheckpointError(f"cannot {description}: not enough memory", LIMITS))
    except CheckpointException as error:  # torch gathers the errors of all ranks in one, with their tracebacks
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        first_line = str(cause).strip().partition("\n")[0]
        return ActionResult(
            error=CheckpointError(f"cannot {description}: rank {rank}: {type(cause).__name__}: {first_line}", REMEDY)
        )


def attempt_aside(action: Callable[[], Any], description: str) -> ActionResult:
    """`attempt` in a background thread, where a bug would otherwise go unnoticed and leave ranks waiting."""
    try:
        return attempt(action, description)
    except Exception as error:
        if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
            return ActionResult(error=no_thread(error, description))
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"cannot {description}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        return ActionResult(error=MoeTrainError(text, "this is a bug"))


def no_thread(error: RuntimeError, description: str) -> CheckpointError:
    """The error where a thread that the work needs cannot be started."""
    return CheckpointError(f"cannot {description}: {error}", LIMITS)


def full_disk(error: OSError) -> bool:
    """Whether it says that there is no space left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(path: Path) -> int:
    """What can still be written to the disk of a directory."""
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize


def say(line: str) -> None:
    """One line of the run."""
    print(line, flush=True)


def say_on_main(ranks: RankContext, line: str) -> None:
    """One line of the run, once for all ranks."""
    if ranks.is_main:
        say(line)


def warn(line: str) -> None:
    """One line of warning, which may quote a file: without controls of a terminal."""
    print(f"warning: {one_line(line)}", file=sys.stderr, flush=True)


def _raise_first(errors: list[Any]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _value(outcome: ActionResult) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value
