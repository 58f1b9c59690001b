"""What starting a command costs: the modules that it imports, and its function calls.

Calls stand for processor time. They are the same on every machine and in every run; seconds are not.
A million calls took about 0.45 s on a Zen 4.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.launch.programs import environment

ROOT = Path(__file__).parents[1]
SLOW = ("torch", "megatron", "numpy", "transformers", "matplotlib")
"""Packages whose import takes longer than a login node's user should wait."""

_COUNTED = """
import sys
_calls = 0
def _count(frame, event, arg):
    global _calls
    _calls += event == "call"
sys.setprofile(_count)
try:
    {code}
except SystemExit as end:
    if end.code:
        raise
finally:
    sys.setprofile(None)
slow = sorted({{module.partition(".")[0] for module in sys.modules}} & {slow!r})
print(_calls, *slow, file=sys.stderr)
"""


class Startup(NamedTuple):
    """Python functions that a process called, and those of the packages `SLOW` that it imported."""

    calls: int
    slow: list[str]


def startup(code: str, *words: str, directory: Path = ROOT) -> Startup:
    """Run one line of Python in a new interpreter, with `words` as its arguments.

    Raises:
        AssertionError: it failed.
    """
    program = _COUNTED.format(code=code, slow=set(SLOW))
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=directory, env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls, *slow = done.stderr.splitlines()[-1].split()
    return Startup(int(calls), slow)
