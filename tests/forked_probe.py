"""Prints what a process is given, and ends in the way that it is told: python -m tests.forked_probe END"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import tempfile
import threading
import time


def facts() -> dict[str, object]:
    """What may differ between a new process and a fork."""
    numbers = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    return {
        "arguments": sys.argv,
        "first path": sys.path[0],
        "main": [__name__, sys.modules["__main__"].__spec__.name],  # type: ignore[union-attr]
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)).split(" at ")[0] for number in numbers],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "umask": os.umask(0),
        "leads its group": os.getpgrp() == os.getpid(),
        "files": sorted(name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")),
        "input": sys.stdin.read(),
        "streams": [[stream.encoding, stream.errors, stream.line_buffering, stream.name, stream.mode]
                    for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "temporary": tempfile.gettempdir(),
        "threads": threading.active_count(),
    }  # fmt: skip


def end(how: str) -> None:
    if how == "by signal":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "sleeps":
        time.sleep(60)
    if how == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    if how == "raises":
        raise ValueError("made up")
    if how == "text":
        sys.exit("a reason")
    if how == "with a thread":
        threading.Thread(target=lambda: (time.sleep(0.2), print("from a thread"))).start()
    if how.isdigit():
        sys.exit(int(how))


if __name__ == "__main__":
    atexit.register(print, "at exit")
    print(json.dumps(facts()))
    end(sys.argv[1])
