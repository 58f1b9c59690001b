"""moe-evaluate in the process of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_train.config.composition.compose import compose
from moe_train.config.roots import EvaluateRoot
from tools import evaluate
from tools.words import parse


def evaluated(output: Path, *words: str) -> dict[str, Any]:
    """What moe-evaluate writes for a command line."""
    line = parse([f"evaluate.output={output}", "runtime=cpu", *words])
    evaluate.run(compose(evaluate.arguments(line), EvaluateRoot), line.overrides)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def scores(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of its table, by source."""
    return {row["name"]: row for row in report["scores"]}
