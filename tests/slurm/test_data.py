"""`launch/data.sbatch` and `moe-submit data` on three tasks of a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.data.corpora import planted, texts, write_txt
from tests.slurm.conftest import ROOT, Jobs

OUTPUT = ("text_document.bin", "text_document.idx", "tokenizer.json")


def test_three_tasks_make_the_dataset_that_one_process_makes(jobs: Jobs, tmp_path: Path) -> None:
    documents, _ = planted(2000, seed=1)  # 15 MB: 15 shards
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text("".join(lines))
    write_txt(tmp_path / "text/small", texts(50))
    words = ["data=text", f"data.path={tmp_path}/text", "data.near_duplicates=0.8", "data.tokenizer_vocab_size=300"]
    environment = jobs.cluster.environment(PYTHONPATH=str(ROOT))
    alone = [sys.executable, "-P", "-m", "tools.prepare_data", *words, f"data.dir={tmp_path}/alone"]
    subprocess.run(alone, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    command = [
        sys.executable, "-P", "-m", "launch.slurm.submit", "data", *words, f"data.dir={tmp_path}/together",
        "launcher.nodes=3", "launcher.time_limit_min=10", "launcher.exclusive=false", "launcher.memory_gib=1",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=jobs.dir, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    (place,) = (tmp_path / "together/submissions").iterdir()
    (job,) = json.loads((place / "submission.json").read_text())["jobs"]
    facts = jobs.end(job)
    output = (tmp_path / f"together/slurm-{job}.out").read_text()
    assert facts["JobState"] == "COMPLETED", output
    assert output.count("documents read") == 1, "one task reports"
    for name in OUTPUT:
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_error_of_a_task_is_printed_once_and_ends_the_job(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    flags = ["--parsable", "--nodes=3", "--time=10", f"--chdir={tmp_path}", f"--output={tmp_path}/out.txt"]
    words = ["data=text", "data.path=text", "data.dir=out"]
    variables = {"MOE_PYTHON": sys.executable, "MOE_CODE": str(ROOT)}
    job = jobs.cluster.run("sbatch", *flags, str(ROOT / "launch/data.sbatch"), *words, **variables).strip()
    facts = jobs.end(job)
    output = (tmp_path / "out.txt").read_text()
    assert facts["ExitCode"] == "2:0", output
    assert output.count("error: text/a.jsonl line 2 has no text under 'text'") == 1, output
