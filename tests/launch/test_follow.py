"""What moe-submit tells of a run from its files, which the run may be writing, or a crash may have cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import follow, snapshot
from moe_train.config.compose import compose, to_yaml
from parallel.errors import ConfigError


@pytest.mark.parametrize(("loss", "shown"), [("4.25", "4.2500"), ("null", "not finite")])
def test_the_last_step_of_a_run(loss: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["train.steps=20"])))
    lines = [
        '{"step": 1, "lm_loss": 9.0}', f'{{"step": 12, "tokens": 1536, "lm_loss": {loss}, "tokens_per_s": 1234.5}}',
        '{"step": 12, "valid_loss": 5.0}', "[" * 100_000, "7", '{"lm_loss": 1.0}', '{"step": 13, "lm_l',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert follow._last_step(tmp_path) == f"step 12 of 20, loss {shown}, 1,234 tokens/s"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"command": "sbatch", "environment": {}}', '{"command": [1], "environment": {}}',
             '{"command": [], "environment": []}', '{"command": [], "environment": {}, "jobs": [7]}',
             '{"command": [], "environment": {}, "more": 1}', pytest.param("[" * 100_000, id="nested")],
)  # fmt: skip
def test_a_damaged_submission_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / snapshot.FACTS).write_text(text)
    with pytest.raises(ConfigError, match=r"submission\.json cannot be read: .*; submit the run again"):
        snapshot.read(tmp_path)


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    submission = snapshot.Submission(["sbatch", "a b"], {"A": "1"}, ["7"])
    snapshot.write(submission, tmp_path)
    assert snapshot.read(tmp_path) == submission
    assert json.loads((tmp_path / snapshot.FACTS).read_text())["jobs"] == ["7"]
