"""What moe-submit tells of a run from its files, which the run may be writing, or a crash may have cut short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.slurm import status, submission
from moe_train.config.composition.compose import compose, to_yaml
from parallel.errors import ConfigError


@pytest.mark.parametrize(("loss", "shown"), [("4.25", "4.2500"), ("null", "not finite")])
def test_the_last_step_of_a_run(loss: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["train.steps=20"])))
    lines = [
        '{"step": 1, "lm_loss": 9.0}', f'{{"step": 12, "tokens": 1536, "lm_loss": {loss}, "tokens_per_s": 1234.5}}',
        '{"step": 12, "valid_loss": 5.0}', "[" * 100_000, "7", '{"lm_loss": 1.0}', '{"step": 13, "lm_l',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert status._last_step(tmp_path) == f"step 12 of 20, loss {shown}, 1,234 tokens/s"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"command": "sbatch", "environment": {}}', '{"command": [1], "environment": {}}',
             '{"command": [], "environment": []}', '{"command": [], "environment": {}, "jobs": [7]}',
             '{"command": [], "environment": {}, "jobs": ["--user=root"]}',
             '{"command": [], "environment": {}, "more": 1}', pytest.param("[" * 100_000, id="nested")],
)  # fmt: skip
def test_a_damaged_submission_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / submission.FACTS).write_text(text)
    with pytest.raises(ConfigError, match=r"submission\.json cannot be read: .*; submit the run again"):
        submission.read(tmp_path)


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = submission.Submission(["sbatch", "a b"], {"A": "1"}, ["7"])
    submission.write(written, tmp_path)
    assert submission.read(tmp_path) == written
    assert json.loads((tmp_path / submission.FACTS).read_text())["jobs"] == ["7"]


def test_logs_of_any_size_and_content_are_shown_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log of 10 GB, one that ends in a line of 1 MB, what a terminal would obey, a pipe and a link to nothing."""
    place = tmp_path / submission.FOLDER / "2026-01-01"
    (tmp_path / "logs").mkdir()
    place.mkdir(parents=True)
    submission.write(submission.Submission(["sbatch"], {}, ["7"]), place)
    large, text, long, pipe, link = (
        tmp_path / name for name in ("slurm-7.out", "logs/a.log", "logs/b.log", "logs/c.log", "logs/d.log")
    )
    with large.open("wb") as file:
        file.truncate(10 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b"line %d\n" % i for i in range(100)))
    text.write_bytes(b"\x1b]0;title\x07\xff\tx\r\n10 %\r20 %\r30 %\nnext\xe2\x80\xaeline\n")
    long.write_bytes(b"first\n" + b"x" * (1 << 20))
    os.mkfifo(pipe)
    link.symlink_to("nothing")
    for second, path in enumerate((large, text, long, pipe), 1):
        os.utime(path, (second, second))
    status.logs(str(tmp_path))
    shown = dict.fromkeys((link, large, text, long, pipe), "")
    parts = capsys.readouterr().out.split("--- ")[1:]
    assert [part.partition("\n")[0] for part in parts] == [str(path) for path in shown]  # oldest first
    lines = {path.name: part.splitlines()[1:] for path, part in zip(shown, parts, strict=True)}
    assert lines["slurm-7.out"] == [f"line {i}" for i in range(85, 100)]
    assert lines["a.log"] == [r"\x1b]0;title\x07" + "\ufffd     x", "30 %", r"next\u202eline"]
    assert lines["b.log"] == ["x" * 1000 + "..."]
    assert lines["c.log"] == ["cannot be read: it is a named pipe and not a file"]
    assert lines["d.log"] == ["cannot be read: No such file or directory"]
