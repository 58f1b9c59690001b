"""Durations and orders in time come from monotonic clocks: somebody may set the other one while a run goes on."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What shows or compares times of day: (file, function).
MAY_READ_THE_WALL_CLOCK = {
    ("launch/failures.py", "record"),  # a timestamp in torch elastic's format, for people
    ("launch/lock.py", "_in_use"),  # the age of a heartbeat in an error message
    ("moe_train/checkpoint/node_local.py", "move"),  # a name that no earlier run has
    ("moe_train/checkpoint/node_local.py", "set_aside"),  # the function around it
    ("moe_train/inference/chat_template.py", "_now"),  # templates put today's date into the text
    ("moe_train/telemetry/sinks/tensorboard.py", "_open"),  # TensorBoard orders files by the time in their names
    ("moe_train/telemetry/sinks/tensorboard.py", "_put"),  # every event has a time of day
}


def readers(path: Path) -> set[str]:
    """Functions of a file that call time.time or datetime.now."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            calls = (ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call))
            if any(call.endswith(("time.time", "datetime.now", "time.time_ns")) for call in calls):
                found.add(function.name)
    return found


def test_nobody_measures_with_the_wall_clock() -> None:
    files = [file for package in ("moe_train", "parallel", "launch") for file in (ROOT / package).rglob("*.py")]
    found = {(str(file.relative_to(ROOT)), name) for file in files for name in readers(file)}
    assert found <= MAY_READ_THE_WALL_CLOCK
    assert ("launch/failures.py", "record") in found  # the check sees it
