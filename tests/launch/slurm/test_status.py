"""What moe-submit tells of a run from its files, which the run may be writing, or a crash may have cut short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.slurm import commands, status, submission
from moe_train.config.composition.compose import compose, to_yaml
from parallel.errors import ConfigError, LaunchError


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


def _submitted(run_dir: Path, jobs: list[str], monkeypatch: pytest.MonkeyPatch, **states: str) -> list[tuple[str, ...]]:
    """A submission of `jobs`, whose states Slurm knows where they are given. Returns what it is asked."""
    place = run_dir / submission.FOLDER / "2026-01-01"
    place.mkdir(parents=True)
    submission.write(submission.Submission(["sbatch"], {}, jobs), place)
    asked: list[tuple[str, ...]] = []

    def run(*words: str) -> str:
        asked.append(words)
        if words[0] != "scontrol":
            return ""
        if f"job{words[-1]}" not in states:
            raise LaunchError("scontrol: slurm_load_jobs error: Invalid job id specified")
        return f"JobId={words[-1]} JobState={states[f'job{words[-1]}']} NodeList=n[1-2] RunTime=00:01:00 Restarts=0\n"

    monkeypatch.setattr(commands, "run", run)
    return asked


def test_each_job_is_shown_with_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _submitted(tmp_path, ["7", "8"], monkeypatch, job8="NODE_FAIL")
    status.status(str(tmp_path))
    assert capsys.readouterr().out == "job 7: no longer known to slurm\njob 8: node fail, on n[1-2], for 00:01:00\n"


@pytest.mark.parametrize(
    ("states", "cancelled"),
    [({"job8": "RUNNING"}, [("scancel", "8")]),
     ({"job7": "RUNNING", "job8": "PENDING", "job9": "PENDING"}, [("scancel", "8", "9"), ("scancel", "7")])],
)  # fmt: skip
def test_later_jobs_of_a_chain_are_cancelled_first(
    states: dict[str, str], cancelled: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would start when the first has ended."""
    asked = _submitted(tmp_path, ["7", "8", "9"], monkeypatch, **states)
    status.cancel(str(tmp_path))
    assert [words for words in asked if words[0] == "scancel"] == cancelled


def test_a_controller_that_does_not_answer_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _submitted(tmp_path, ["7"], monkeypatch)

    def down(*_: str) -> str:
        raise LaunchError("scontrol: Unable to contact slurm controller")

    monkeypatch.setattr(commands, "run", down)
    with pytest.raises(LaunchError, match="Unable to contact"):
        status.cancel(str(tmp_path))
