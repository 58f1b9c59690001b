"""`moe-generate`: prompts in, texts out."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tools import generate

MODEL = ["sampling.max_new_tokens=8", "runtime=cpu"]


def command(*words: str, text: str | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "moe-generate")
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.write(text or "")
        stdin.seek(0)
        done = forked.run([program, *words, *MODEL], stdin=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def test_files_of_json_lines_and_single_prompts_get_the_same_texts(trained: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "some text"}, {"prompt": "", "max_new_tokens": 3, "id": "x"},
        {"prompt": "drawn", "temperature": 1.0, "n": 2, "seed": 5, "logprobs": 2},
    ]  # fmt: skip
    source.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    done = command(str(trained / "run"), f"generate.input={source}", f"generate.output={target}")
    assert done.stdout == ""
    assert f"{target}: 4 continuations" in done.stderr
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(r["index"], r["completion"], len(r["tokens"])) for r in results] == [
        (0, 0, 8),
        (1, 0, 3),
        (2, 0, 8),
        (2, 1, 8),
    ]
    assert [r.get("id") for r in results] == [None, "x", None, None]
    assert results[2]["text"] != results[3]["text"]
    assert [len(top) for top in results[3]["top_logprobs"]] == [2] * 8
    assert "logprobs" not in results[0]
    assert {r["finish_reason"] for r in results} == {"length"}
    alone = command(str(trained / "run"), "some text")
    assert alone.stdout == results[0]["text"] + "\n"
    assert command(str(trained / "run"), text="some text\n").stdout == alone.stdout


def test_the_engine_has_the_layout_and_the_options_of_the_command_line(trained: Path) -> None:
    words = [
        str(trained / "run" / "hf" / "step_00000002"),
        "some text",
        "generate.n=2",
        "parallel.tp=2",
        "parallel.ep=2",
    ]
    done = command(*words, "sampling.stop=[e]", "engine.cache_format=int8")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["text"] == second["text"]
    assert "e" not in first["text"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "source is missing: the model; use moe-generate runs/NAME"),
        (["{run}"], 'generate.prompt is missing; use moe-generate RUN "text"'),
        (
            ["{run}", "a", "generate.input=b"],
            "generate.prompt and generate.input=b are both set; leave one of them out",
        ),
        (["{run}", "generate.input={bad}"], "bad.jsonl, line 2 has temperature='hot', which is not a number; correct"),
        (["{run}", "a", "generate.output={run}"], "is a directory; name a file in a directory that exists"),
        (["{run}", "a", "sampling.top_p=2"], "sampling.top_p=2.0 is above the largest value 1"),
        (["{run}", "a", "parallel.tp=3"], "parallel.tp=3 does not divide"),
        (["{run}", "a", "train.steps=3"], "train.steps is not in the configuration of this command"),
        (["{run}", "a", "init_from=x"], "init_from is not a field of moe-generate; use source=x"),
        (["{run}", "a", "sampling.max_new_tokens=5000"], "prompt 0: its 1 tokens and max_new_tokens=5000 exceed"),
        (["nowhere", "a"], "source=nowhere does not exist"),
        (["{run}", "a", "tokenizer=nowhere"], "tokenizer=nowhere has no tokenizer.json"),
        (["{run}", "a", "{run}"], "cannot read the override '{run}'"),
    ],
)
def test_what_is_typed_wrong_is_told_in_one_line(
    words: list[str], told: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "temperature": "hot"}\n')
    given = [word.format(run=trained / "run", bad=tmp_path / "bad.jsonl") for word in words]
    monkeypatch.setattr(sys, "argv", ["moe-generate", *given])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as ended:
        generate.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ")
    assert told.replace("{run}", str(trained / "run")) in said
    assert said.count("\n") == 1


def test_a_prompt_that_the_cache_cannot_hold_writes_nothing(trained: Path, tmp_path: Path) -> None:
    words = [str(trained / "run"), "some text " * 20, f"generate.output={tmp_path}/out", "engine.num_blocks=2"]
    done = command(*words, code=2)
    assert "error: prompt 0: a prompt of" in done.stderr
    assert list(tmp_path.iterdir()) == []
