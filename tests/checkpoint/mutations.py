"""Damage of every kind to the files of checkpoints, drawn with a seed, and how a command took it.

A mutation either leaves a checkpoint that can be read, or the command ends with a typed error of exit code 2 in one
line, within `CPU_S` and `MEMORY_BYTES`, and leaves nothing where it was to write.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.roots import ConvertRoot, InspectRoot
from moe_train.formats.communicator import SingleProcess
from moe_train.formats.directory_writer import partial_of
from parallel.errors import MoeTrainError
from tools import convert, inspect
from tools.words import parse

UNREAD = ("tokenizer.json", "common.pt", "metadata.json")
CPU_S, MEMORY_BYTES = 10, 1 << 30
LONGEST_LINE = 2500
BLOCKED_S = 120
"""Wall-clock time after which a command counts as blocked. Other processes may have the processors for most of it."""

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, 2**70, 10**10, 1e300, float("inf"), float("nan"), "", "x",
    "../../etc/passwd", "/etc/passwd", "a\nb\x1b[31m", "\0", "F32", "x" * 5000, [], {}, [[]], [-1], [10**10, 10**10],
    {"a": 1},
)  # fmt: skip
Draw = random.Random


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


def _in_json(data: bytes, draw: Draw) -> bytes:
    """Other JSON: a value replaced, removed or added, a name twice, or too deep."""
    value = json.loads(data)
    *parents, last = draw.choice(_places(value))
    inside = value
    for key in parents:
        inside = inside[key]
    kind = draw.randrange(5)
    if kind == 0 and isinstance(inside, dict):
        del inside[last]
    elif kind == 1 and isinstance(inside, dict):
        inside[str(draw.choice(ODD))] = draw.choice(ODD)
    elif kind == 2:
        return data.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    elif kind == 3:
        text = json.dumps(value)
        return text.replace(json.dumps(inside[last]), "[" * 100_000, 1).encode()
    else:
        inside[last] = draw.choice(ODD)
    return json.dumps(value).encode()


def _in_bytes(data: bytes, draw: Draw) -> bytes:
    """Other bytes: flipped, cut off, doubled, set to zero, or with some more between."""
    at = draw.randrange(len(data))
    length = min(draw.choice((1, 2, 8, 100)), len(data) - at)
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(length) + data[at + length :]
    if kind == 2:
        return data[:at] + bytes(length) + data[at + length :]
    if kind == 3:
        return data[:at] + draw.randbytes(length) + data[at:]
    if kind == 4:
        return data[:at] + data[at + length :]
    flipped = bytearray(data)
    flipped[at] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _in_header(data: bytes, draw: Draw) -> bytes:
    """A safetensors file with another table of contents."""
    (length,) = struct.unpack("<Q", data[:8])
    text = _in_json(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _in_text(data: bytes, draw: Draw) -> bytes:
    """A YAML file with a line removed, doubled, or with another value."""
    lines = data.decode().splitlines()
    number = draw.randrange(len(lines))
    name, _, _ = lines[number].partition(":")
    lines[number : number + 1] = draw.choice(([], [lines[number]] * 2, [f"{name}: {draw.choice(ODD)!r}"], ["[" * 9999]))
    return "\n".join(lines).encode()


def mutate(path: Path, draw: Draw) -> str:
    """Damage the file; returns what was done."""
    special = draw.randrange(25)
    if special == 0:
        path.unlink()
        os.mkfifo(path)
        return "a named pipe"
    if special == 1:
        path.unlink()
        path.mkdir()
        return "a directory"
    data = path.read_bytes()
    changes: list[Callable[[bytes, Draw], bytes]] = [_in_bytes]
    if path.suffix == ".json":
        changes += [_in_json, _in_json]
    elif path.suffix == ".safetensors":
        changes += [_in_header, _in_header]
    elif path.suffix == ".yaml":
        changes += [_in_text, _in_text]
    elif path.name == ".metadata":  # its end and its start hold what is of most weight
        changes += [lambda d, r: _in_bytes(d[:2000], r) + d[2000:], lambda d, r: d[:-500] + _in_bytes(d[-500:], r)]
    change = draw.choice(changes)
    path.write_bytes(change(data, draw))
    return change.__name__


def _commands(source: Path, target: Path) -> dict[str, Callable[[], Any]]:
    cfg = ConvertRoot()
    cfg.convert.source, cfg.convert.target, cfg.convert.threads = str(source), str(target), 1
    described = InspectRoot()
    described.inspect.path, described.inspect.threads = str(source), 1
    verified = ConvertRoot()
    verified.convert.source, verified.convert.threads = str(source), 1
    return {
        "convert": lambda: convert.run(cfg, parse([], ["verify"]), SingleProcess()),
        "verify": lambda: convert.run(verified, parse(["verify"], ["verify"]), SingleProcess()),
        "inspect": lambda: inspect.run(described, compared=False),
    }


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    problem: str = ""
    """What was wrong with it; "" where nothing was."""
    error: MoeTrainError | None = None


def ending(command: Callable[[], Any]) -> Ending:
    """Call `command` within `CPU_S`, and judge its error and what it prints."""

    def late(number: int, _: object) -> None:
        raise TimeoutError("blocked" if number == signal.SIGALRM else f"more than {CPU_S} s")

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, BLOCKED_S)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            command()
    except MoeTrainError as error:
        is_right = error.exit_code == 2 and "\n" not in str(error) and error.cause and error.remedy
        return Ending("" if is_right else f"exit code {error.exit_code}, {error}", error)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Ending(f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    odd = [line for line in printed.getvalue().split("\n") if not line.isprintable() or len(line) > LONGEST_LINE]
    return Ending(f"it prints {odd[0][:300]!r}" if odd else "")


def _judge(name: str, command: Callable[[], Any], target: Path) -> str:
    """What was wrong with how a command ended; "" where nothing was."""
    ended = ending(command)
    if ended.problem:
        return f"{name}: {ended.problem}"
    if ended.error and name == "convert" and (os.path.lexists(target) or os.path.lexists(partial_of(target))):
        return f"{name}: left something after {ended.error}"
    return ""


def bound_memory() -> None:
    """Allow this process `MEMORY_BYTES` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def judged(sources: list[Path], count: int, seed: int, scratch: Path) -> tuple[int, list[str]]:
    """How many of `count` mutations were refused, and what was wrong. Runs in this process, whose memory it bounds."""
    bound_memory()
    wrong, refused = [], 0
    for number in range(count):
        draw = Draw(f"{seed} {number}")
        source, target = scratch / "source", scratch / "target"
        shutil.copytree(draw.choice(sources), source)
        file = draw.choice(sorted(p for p in source.iterdir() if p.is_file() and p.name not in UNREAD))
        what = f"{number}: {file.relative_to(source)}: {mutate(file, draw)}"
        for name, command in _commands(source, target).items():
            if problem := _judge(name, command, target):
                wrong.append(f"{what}: {problem}")
            refused += name == "convert" and not target.exists()
        for path in (source, target, partial_of(target)):
            shutil.rmtree(path, ignore_errors=True)
    return refused, wrong


def judged_aside(sources: list[Path], count: int, seed: int, scratch: Path) -> tuple[int, list[str]]:
    """`judged` in a process of its own."""
    result = scratch / "result"
    child = os.fork()
    if child == 0:
        gc.freeze()  # what is garbage of the parent may wait, as it ends, for threads that this process does not have
        with contextlib.suppress(BaseException):
            result.write_text(json.dumps(judged(sources, count, seed, scratch)))
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    refused, wrong = json.loads(result.read_text())
    return refused, wrong
