"""lm-evaluation-harness through our interface, against its own Hugging Face backend on the exported model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import ConfigError
from tests.evaluation.evaluate import evaluated

TASKS = Path(__file__).parent / "tasks"
NAMES = ("local_choice", "local_generate", "local_perplexity")
MAX_LENGTH = 40
"""Shorter than the passages, so that both divide them into windows."""


def ours(run_dir: Path, output: Path, *words: str) -> dict[tuple[str, str], float]:
    report = evaluated(
        output, str(run_dir), f"evaluate.tasks=[{','.join(NAMES)}]", f"evaluate.task_dir={TASKS}", *words
    )  # fmt: skip
    return {(row["task"], row["metric"]): row["value"] for row in report["tasks"]}


def of_hugging_face(directory: Path) -> dict[str, Any]:
    """What the package's own backend finds."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(directory), device="cpu", batch_size=4, dtype="float32", max_length=MAX_LENGTH)
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=list(NAMES), task_manager=tasks, bootstrap_iters=0
    )
    return results


@pytest.mark.slow
def test_scores_are_those_of_the_hugging_face_backend(run_dir: Path, exported: Path, tmp_path: Path) -> None:
    for package in ("lm_eval", "accelerate"):  # the second is what the other backend needs
        pytest.importorskip(package)
    from tools.harness import task_scores

    found = ours(
        run_dir, tmp_path / "scores.json", f"evaluate.seq_length={MAX_LENGTH}", "parallel.tp=2", "parallel.ep=2"
    )
    expected = {(row.task, row.metric): row.value for row in task_scores(of_hugging_face(exported))}
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize(
    ("words", "told"),
    [
        pytest.param(
            ["evaluate.tasks=[local_choise]"],
            "evaluate.tasks has local_choise, which is not a task",
            marks=pytest.mark.slow,  # reads all tasks of the package
        ),
        (["evaluate.tasks=[local_choice]", "evaluate.task_dir=absent"], "evaluate.task_dir=absent is not a directory"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(words: list[str], told: str, run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError) as caught:
        evaluated(tmp_path / "scores.json", str(run_dir), f"evaluate.task_dir={TASKS}", *words)
    assert caught.value.cause == told


def test_a_missing_package_is_named(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ConfigError, match="needs lm-eval, which is not installed") as caught:
        evaluated(tmp_path / "scores.json", str(run_dir), "evaluate.tasks=[local_choice]")
    assert caught.value.remedy == "pip install 'moe-train[eval]'"
