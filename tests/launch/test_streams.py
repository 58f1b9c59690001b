"""Output on a full disk."""

from __future__ import annotations

import subprocess
import sys

from tests.launch import programs

CODE = """
import sys, warnings
from launch import streams
streams.tolerate()
for _ in range(10000):
    print("a line of output", flush=True)
print("and an error", file=sys.stderr)
warnings.warn("and a warning")
sys.stdout.flush()
sys.exit(7)
"""


def test_a_process_goes_on_where_its_output_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", CODE], cwd=programs.ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == 7


def test_a_reader_that_has_gone_is_still_an_error() -> None:
    words = [sys.executable, "-c", CODE]
    process = subprocess.Popen(words, cwd=programs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert b"BrokenPipeError" in process.stderr.read()
    process.stderr.close()
