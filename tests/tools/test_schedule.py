"""`moe-schedule`: values at boundaries, batch sizes against the layout, a picture, a run under way."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose, to_yaml
from tests.startup import startup
from tools import schedule

RAMP = "schedule.batch_size=[{shape:linear,start:2,until_tokens:20k,value:8},{}]"


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moe-schedule", *words])
    with pytest.raises(SystemExit) as end:
        schedule.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of the tables."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_it_prints_values_at_boundaries_and_every_batch_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (RAMP, "parallel.dp=2", "schedule=wsd", "train.steps=100", "rows=0")
    code, out, err = said(capsys, monkeypatch, *words)
    assert (code, err) == (0, "")
    tokens, sizes = 0, []
    for _ in range(100):
        sizes.append(int((2 + 6 * min(1, tokens / 20_000)) // 2) * 2)
        tokens += 128 * sizes[-1]
    assert out.startswith(f"tiny: {tokens:,} tokens in 100 steps\n")
    warm = 20 * 128 * 2
    table = rows(out)
    assert table[0] == ["0", "0", "0", "2"]
    assert [f"{warm:,}", "20", "0.001", "2"] in table
    assert [[int(cell) for cell in (row[0], row[2], row[3])] for row in table[-4:]] == [
        [size, sizes.count(size), size // 2] for size in (2, 4, 6, 8)
    ]
    assert table[-5][:2] == [f"{tokens:,}", "100"]


def test_a_size_that_the_layout_cannot_run_is_an_error_with_values_that_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = said(capsys, monkeypatch, RAMP, "parallel.dp=4")
    assert (code, out) == (2, "")
    assert err.startswith("error: schedule.batch_size passes 2 sequences, which is not a multiple of")
    assert err.count("\n") == 1
    fixed = RAMP.replace("start:2", "start:4")
    assert said(capsys, monkeypatch, fixed, "parallel.dp=4", "schedule.batch_size_multiple=4")[0] == 0


def begun(run_dir: Path, *words: str) -> None:
    run_dir.mkdir(parents=True)
    cfg = compose([f"run_dir={run_dir}", *words])
    (run_dir / "config.yaml").write_text(to_yaml(cfg))
    lines = [{"step": step, "tokens": 1024 * step, "lr": 1e-4 * step, "global_batch_size": 8} for step in range(1, 31)]
    event = {"step": 20, "event": "lr_reduced", "factor": 0.5, "best": 3.0, "count": 1}
    torn = '{"step": 31, "tok'
    (run_dir / "metrics.jsonl").write_text("\n".join([*map(json.dumps, [*lines, event]), torn]))


def test_a_run_that_is_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, picture = tmp_path / "run", tmp_path / "schedules.png"
    begun(run_dir, "schedule=wsd", "train.steps=50", "schedule.plateau_patience=3")
    code, out, err = said(capsys, monkeypatch, str(run_dir), f"plot={picture}", "rows=2")
    assert code == 0
    assert err.startswith("no checkpoint yet: the run begins with ")  # what moe-train would say
    assert ["30,720", "30", "0.001", "8", "<"] in rows(out)
    assert "plateau: times 0.5 after 4 evaluations without a better loss, at most 5 times" in out
    assert "step 20: lr_reduced factor=0.5 best=3.0 count=1" in out
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert min(struct.unpack(">II", header[16:])) > 300
    _, out, _ = said(capsys, monkeypatch, str(run_dir), "rows=0", "train.steps=60")
    assert out.startswith("tiny: 61,440 tokens in 60 steps\n")


def test_a_directory_without_a_run_and_a_picture_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = said(capsys, monkeypatch, str(tmp_path / "none"))
    assert (code, err) == (2, f"error: {tmp_path}/none has no config.yaml; name the directory of a run\n")
    code, _, err = said(capsys, monkeypatch, f"plot={tmp_path}/none/a.png")
    assert code == 2
    assert err.startswith(f"error: view.plot={tmp_path}/none/a.png cannot be written: ")


def test_it_starts_quickly_and_without_torch(tmp_path: Path) -> None:
    words = ("experiment=deepseek_v3/pretrain", "runtime=cuda")
    calls, slow = startup("from tools import schedule; schedule.main()", *words, directory=tmp_path)
    assert slow == []
    assert calls < 1_500_000
