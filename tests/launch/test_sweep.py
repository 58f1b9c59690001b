"""The table at the end of a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch import main, sweep
from moe_train.config.composition.compose import SweepJob, hydra_entry
from moe_train.config.schema import Config
from parallel.errors import DataError


def _summary(run_dir: str, last: float) -> None:
    losses = {"train_loss": {"first": 8.0, "last": last}, "valid_loss": {"first": 8.5, "last": last + 1}}
    Path(run_dir, "summary.json").write_text(json.dumps(losses))


def test_a_sweep_ends_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def train(cfg: Config) -> None:
        if cfg.seed == 2:
            raise DataError("no text", "set data.path")
        _summary(cfg.run_dir, 5.0 + cfg.optimizer.lr)

    argv = ["-m", f"run_dir={tmp_path}/s", "seed=1,2", "optimizer.lr=0.1,0.2", "model=tiny"]
    assert hydra_entry(train, argv=argv, after_sweep=sweep.show) == 2
    rows = [line for line in capsys.readouterr().out.splitlines() if "optimizer.lr=" in line]
    assert [row.split("│")[2].strip() for row in rows] == [
        "seed=1 optimizer.lr=0.1", "seed=1 optimizer.lr=0.2", "seed=2 optimizer.lr=0.1", "seed=2 optimizer.lr=0.2"
    ]  # fmt: skip
    assert "8.0000 to 5.1000" in rows[0]
    assert "8.5000 to 6.2000" in rows[1]
    assert "failed: exit code 2" in rows[2]
    assert f"{tmp_path}/s/3" in rows[3]


@pytest.mark.parametrize(("entry", "tables"), [(None, 1), ("module:function", 0)])
def test_moe_train_shows_the_table_where_it_trains(
    entry: str | None, tables: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "train_here", lambda cfg, entry: print("trained", cfg.seed))
    monkeypatch.setattr(sys, "argv", ["moe-train", "-m", f"run_dir={tmp_path}/s", "seed=1,2", "model=tiny"])
    assert main.run(entry) == 0
    output = capsys.readouterr().out
    assert "trained 1" in output
    assert "trained 2" in output
    assert output.count("Sweep") == tables


@pytest.mark.parametrize(
    "text", ["[]", '{"train_loss": [1]}', '{"train_loss": {"first": 1}}', '{"train_loss": {"first": "a", "last": 1}}',
             pytest.param("[" * 100_000, id="nested")],
)  # fmt: skip
def test_a_damaged_summary_leaves_its_losses_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    assert sweep._losses(tmp_path / "summary.json") == ("", "")


def test_one_job_has_no_table(tmp_path: Path) -> None:
    def refuse(jobs: list[SweepJob]) -> None:
        raise AssertionError

    assert hydra_entry(lambda cfg: None, argv=[f"run_dir={tmp_path}/s"], after_sweep=refuse) == 0
