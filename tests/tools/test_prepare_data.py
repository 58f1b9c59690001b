from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.data.corpora import texts

ROOT = Path(__file__).parents[2]


def moe_data(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.prepare_data", *overrides]
    return forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_makes_a_dataset_checks_it_and_explains_damage(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text}) for text in texts(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    overrides = [
        "data=text", f"data.path={tmp_path}", "data.text_key=body", f"data.dir={tmp_path}/out",
        "data.tokenizer_vocab_size=300", "data.prepare_workers=1",
    ]  # fmt: skip
    made = moe_data(*overrides)
    assert made.returncode == 0, made.stderr
    assert f"{tmp_path}/out: 50 documents, " in made.stdout
    assert "tokens of a vocabulary of 300" in made.stdout
    assert moe_data(*overrides).stdout == made.stdout, "made already"

    tokens = tmp_path / "out" / "text_document.bin"
    tokens.write_bytes(b"\xff" + tokens.read_bytes()[1:])
    damaged = moe_data(*overrides)
    assert damaged.returncode == 2
    assert damaged.stderr.startswith(f"error: {tokens} is damaged")
    assert damaged.stderr.count("\n") == 1

    (tmp_path / "a.jsonl").write_text(lines[0] + "\n{")
    wrong = moe_data(*overrides[:3], f"data.dir={tmp_path}/new")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"error: {tmp_path}/a.jsonl line 2 is not JSON")
    assert wrong.stderr.count("\n") == 1

    blend = f"data.blend=[{{path:{tmp_path}/out/text_document}}]"
    checked = moe_data("data=indexed", f"data.dir={tmp_path}/out", blend)
    assert checked.returncode == 2, "what is tokenised already is compared with its checksums too"
    assert checked.stderr.startswith(f"error: {tokens} is damaged")


def test_a_dataset_that_is_not_there_is_explained(tmp_path: Path) -> None:
    result = moe_data("data=indexed", f"data.dir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: data.dir={tmp_path} has no tokenizer.json; make the dataset with moe-data")
    assert result.stderr.count("\n") == 1
