"""`moe-submit` on a login node: what it says, what it refuses, and what it gives to Slurm."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import lock
from launch.slurm import node_count, submit
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.conversion import hf_config
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner.placement import node_spans
from tests.launch.programs import ROOT, environment
from tests.startup import startup

V3 = ("experiment=deepseek_v3/pretrain", "launcher.scratch_dir=null", "data=indexed", "data.dir=corpus")
TINY = (
    "model=tiny", "parallel.pp=2", "parallel.ep=2", "launcher.ranks_per_node=2", "train.steps=10",
    "schedule.warmup_steps=2",
)  # fmt: skip

# A cluster of 300 nodes of 8 GPUs, and a small one for two accounts without GPUs.
_COMMANDS = {
    "sinfo": """kind='2-00:00:00|gpu:h800:8(S:0-1)'
for name in 'h800*' down short; do echo "$name|300|$kind|mix-"; done
for some in "250|$kind|alloc" "30|$kind|drain*" "15|$kind|down" "5|$kind|idle*"; do echo "worn|$some"; done
echo 'small|4|1:00:00|(null)|idle~'""",
    "scontrol": """case "$*" in
  *partition*) echo 'PartitionName=h800 AllowAccounts=ALL MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP'
               echo 'PartitionName=down AllowAccounts=ALL MaxNodes=UNLIMITED State=DOWN'
               echo 'PartitionName=short AllowAccounts=ALL MaxNodes=64 State=UP'
               echo 'PartitionName=small AllowAccounts=physics,chemistry' ;;
  *) [ -f "$LOG.state" ] || { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }
     echo "JobId=71 JobState=$(cat "$LOG.state") NodeList=node[1-2] RunTime=00:01:00 Restarts=0 Reason=None" ;;
esac""",
    "sbatch": """case "$*" in
  *--test-only*--account=nobody*) echo 'allocation failure: Invalid account' >&2; exit 1 ;;
  *--test-only*) echo "${MOE_SUBMITTED:+ours }$SLURM_JOB_ID$RANK$SLURM_CONF" >"$LOG.asked"; exit 0 ;;
esac
printf '%s\\n' "$MOE_CODE" "$@" >>"$LOG"
n=$(($(cat "$LOG.number" 2>/dev/null || echo 70) + 1)); echo $n >"$LOG.number"; echo $n
case "$*" in *--qos=bad*) echo 'sbatch: error: Invalid qos specification' >&2; exit 1 ;; esac""",
    "scancel": 'echo "scancel $*" >>"$LOG"',
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands of that cluster; returns the file to which sbatch writes its arguments."""
    (tmp_path / "bin").mkdir()
    for name, text in _COMMANDS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "log"


def _prepared(directory: Path, tokens: int = 20_000_000_000_000) -> str:
    directory.mkdir(exist_ok=True)
    files = {name: {"bytes": 4, "sha256": ""} for name in ("text_document.bin", "text_document.idx")}
    for name in files:
        (directory / name).write_bytes(b"text")
    (directory / "manifest.json").write_text(json.dumps({"files": files, "tokens": tokens, "vocab_size": 1000}))
    return str(directory)


# What is wrong, the overrides after V3, and a part of the one line that says so.
WRONG = {
    "unknown field": (["launcher.partitions=x"], "launcher.partitions is not a field"),
    "unknown experiment": (["experiment=deepseek_v3/pretrian"], "experiment=deepseek_v3/pretrain"),
    "no number": (["launcher.time_limit_min=long"], "launcher.time_limit_min=long is not an integer"),
    "too few nodes for the layout": (["launcher.nodes=10"], "there are 80 ranks"),
    "a degree that does not divide": (["parallel.ep=24"], "parallel.ep=24"),
    "pipeline that does not fit": (["launcher.nodes=256", "parallel.dp=null", "parallel.pp=3"], "3 does not divide"),
    "layout that fills nodes in part": (["parallel.pp=2", "parallel.dp=66", "parallel.ep=22", "model.num_experts=22",
                                         "model.router_num_groups=0", "model.router_topk_groups=0",
                                         "batch.global_batch_size=660", "schedule=cosine"], "do not fill nodes of"),
    "too few nodes for the memory": (["parallel.dp=64", "recompute=none"], "and a GPU has 78.6"),
    "more nodes than there are": (["parallel.dp=192", "batch.global_batch_size=1920", "schedule=cosine"],
                                 "partition h800 has 300"),
    "over the time limit": (["launcher.time_limit_min=4000"], "exceeds the 2880 minutes of partition h800"),
    "warning longer than the job": (["launcher.time_limit_min=8"], "less than half of launcher.time_limit_min=8"),
    "meeting longer than the job": (["launcher.time_limit_min=20", "launcher.rendezvous_timeout_s=900"],
                                    "launcher.rendezvous_timeout_s=900 leaves less than half"),
    "no FP8": (["cluster=a100"], "cluster=a100 has no FP8 or FP4"),
    "no MXFP8": (["cluster=h100", "precision=mxfp8"], "cluster=h100 has no MXFP8"),
    "no NVFP4": (["cluster=h800", "precision=nvfp4"], "cluster=h800 has no NVFP4, which needs Blackwell"),
    "vocabulary below the tokenizer's": (["model.vocab_size=900"], "is below the 1,000 entries of the tokenizer of"),
    "corpus that is read too often": (["data.dir=little"], "and the run of 14,800"),
    "text that is read too often": (["data=text", "data.path=page.txt", "data.dir=none"], "page.txt has 18 bytes"),
    "unknown partition": (["launcher.partition=h900"], "launcher.partition=h900 is not a partition"),
    "more GPUs than a node has": (["launcher.ranks_per_node=16"], "exceeds the 8 GPUs of a node"),
    "fewer GPUs than ranks": (["launcher.gpus_per_node=4"], "exceeds launcher.gpus_per_node=4"),
    "simulated": (["runtime=simulated", "parallel.dispatcher=alltoall"], "runtime=simulated runs on one machine"),
    "no dataset": (["data=indexed", "data.dir=nowhere"], "holds no dataset: manifest.json does not exist"),
    "dataset of nothing": (["data=indexed", "data.dir=empty"], "manifest.json is damaged: KeyError 'files'"),
    "dataset without its text": (["data=indexed", "data.dir=lost"], "text_document.bin, which manifest.json names,"),
    "dataset cut off": (["data=indexed", "data.dir=cut"], "text_document.bin has 2 bytes, not 4"),
    "corpus far too small": (["data=stdlib", "data.dir=stdlib"], "would read them 1,827,160 times"),
    "checkpoints of one node": (["checkpoint.dir=/dev/shm/ck"], "checkpoint.dir=/dev/shm/ck is under /dev/shm"),
    "data of one node": (["launcher.scratch_dir=scratch", "data.dir=scratch/corpus"], "data.dir=scratch/corpus is"),
    "partition that is down": (["launcher.partition=down"], "partition down is DOWN"),
    "more nodes than a job may have": (["launcher.partition=short"], "gives a job at most 64 (MaxNodes)"),
    "account that Slurm does not know": (["--dry-run", "launcher.account=nobody"], "Invalid account"),
    "heartbeats without their launcher": (["resilience.nvrx=true"], "not launcher.start=srun"),
    "slow ranks not looked for": (["resilience.straggler_action=stop", "resilience.straggler_interval_steps=0"],
                                  "does nothing with"),
    "fault after the end": (["resilience.inject=[{kind:kill,rank:0,step:99000000}]"], "the run ends after step"),
    "watchdog later than collectives": (["resilience.hang_timeout_s=900"], "exceeds launcher.timeout_s=600"),
    "damaged dataset": (["data=indexed", "data.dir=damaged"], "is damaged"),
    "no text": (["data=text", "data.path=nowhere"], "data.path=nowhere does not exist"),
    "no blend": (["data=indexed", "data.blend=[{path:missing,weight:1.0}]"], "missing.bin does not exist"),
    "no weights to start from": (["init_from=nowhere"], "init_from=nowhere does not exist"),
    "no checkpoint to resume": (["resume=nowhere"], "resume=nowhere is neither auto"),
    "run directory of one node": (["run_dir=/dev/shm/moe-submit-test"], "which each node has for itself"),
    "more nodes than asked for": (["launcher.min_nodes=300"], "launcher.min_nodes=300 exceeds the 256 nodes"),
    "no layout for fewer nodes": (["launcher.min_nodes=255"], "lets the job start with 255 nodes"),
    "fewest nodes without layout, though others have one": (
        ["launcher.min_nodes=100", "launcher.fallbacks=[{parallel:{dp:64}}]"],
        "use launcher.min_nodes=128 (layouts fit 128, 256 nodes)"),
    "fallback without fewest nodes": (
        ["launcher.fallbacks=[{parallel:{dp:64}}]"],
        "never has fewer than 256 without launcher.min_nodes; set launcher.min_nodes=128"),
    "fallback for fewer than the fewest nodes": (
        ["launcher.min_nodes=200", "launcher.fallbacks=[{parallel:{dp:64}}]"],
        "{parallel:{dp:64}}, which fits 128 nodes, and the job never has fewer than launcher.min_nodes=200"),
    "fallback for more nodes than the job has": (
        ["launcher.min_nodes=128", "launcher.fallbacks=[{parallel:{dp:64}},{parallel:{dp:256}}]"],
        "{parallel:{dp:256}}, which needs 512 nodes, and the job never has more than 256"),
    "fallback after one that always fits": (
        ["launcher.min_nodes=128", "launcher.nodes=256", "parallel.dp=null", "launcher.fallbacks=[{parallel:{dp:64}}]"],
        "{parallel:{dp:64}}, which is never taken: on 128 nodes the layout before it fits"),
    "fallback of half a node": (
        ["launcher.min_nodes=128", "launcher.fallbacks=[{parallel:{pp:1,ep:4,dp:4}}]"],
        "needs 4 ranks, and nodes have 8"),
    "fallback that breaks a rule": (
        ["launcher.min_nodes=128", "launcher.fallbacks=[{parallel:{dp:64},recompute:{modules:[]}}]"],
        "cannot be used: recompute.mode=selective names nothing"),
    "fallback too large for its GPUs": (
        ["launcher.min_nodes=64", "launcher.fallbacks=[{parallel:{pp:8,dp:64}}]"],
        "where {parallel:{pp:8,dp:64}} of launcher.fallbacks is used and stage 0 of 8 needs 93.1 GiB"),
    "too large for the GPUs of fewer nodes": (
        ["launcher.min_nodes=128", "launcher.nodes=256", "parallel.dp=null", "cluster.memory_gib=72.9"],
        "launcher.min_nodes=128 lets the job start with 128 nodes, where stage"),
    "fallback of another batch": (["launcher.fallbacks=[{batch:{global_batch_size:8}}]"], "not a field of the layout"),
    "two jobs in one run": (["launcher.preflight=resubmit", "launcher.chain=2"], "would start a second job"),
    "image that mpirun would ignore": (["launcher.container=nvcr.io/x", "launcher.start=mpirun"],
                                       "outside launcher.container"),
    "no image": (["launcher.container=/nowhere.sqsh"], "launcher.container=/nowhere.sqsh does not exist"),
    "data outside the image": (["launcher.container=nvcr.io/x", "launcher.mounts=[scratch]", "data.dir=corpus",
                                "run_dir=scratch/run"], "/corpus is not in launcher.container"),
    "checkpoints outside the image": (["launcher.container=nvcr.io/x", "checkpoint.dir=../elsewhere"],
                                      "elsewhere is not in launcher.container"),
    "mount without image": (["launcher.mounts=[/data]"], "launcher.mounts is for launcher.container"),
    "variable without value": (["launcher.environment=[NCCL_DEBUG]"], "which is not NAME=VALUE"),
    "all memory of shared nodes": (["launcher.exclusive=false"], "use launcher.memory_gib=N"),
    "more adapters than GPUs": (["launcher.nics=[a,b,c,d,e,f,g,h,i]"], "launcher.nics has 9 adapters"),
    "refused by Slurm": (["launcher.qos=bad"], "Slurm refuses the job: sbatch: Invalid qos"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_submission_is_refused_with_a_reason(
    words: list[str], told: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"damaged": "{", "empty": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    for name in ("corpus", "lost", "cut", "scratch"):
        _prepared(tmp_path / name)
    _prepared(tmp_path / "scratch/corpus")
    _prepared(tmp_path / "little", tokens=1_500_000)
    (tmp_path / "page.txt").write_text("eighteen bytes: 18")
    (tmp_path / "lost/text_document.bin").unlink()
    (tmp_path / "cut/text_document.bin").write_bytes(b"te")
    base = [word for word in V3 if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    assert submit.run([*base, f"run_dir={tmp_path}/run", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: "), errors
    assert errors.count("\n") == 1, errors
    assert told in errors
    assert not cluster.exists() or "--qos=bad" in cluster.read_text()


def test_an_account_that_the_partition_does_not_take(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "runtime=cpu", "launcher.partition=small", "launcher.time_limit_min=30"]
    assert submit.run(words) == 2
    assert "use launcher.account=physics or chemistry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "50 of the 300 nodes of partition worn are down, drained, in maintenance or silent: the job waits until"),
        (["launcher.min_nodes=128", "launcher.fallbacks=[{parallel:{dp:64}}]"], ""),
        (["launcher.partition=small", "runtime=cpu"], ""),
    ],
)  # fmt: skip
def test_nodes_that_are_down_are_told(
    more: list[str], told: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may come back, so the job is not refused."""
    words = [*V3[:-1], f"data.dir={_prepared(tmp_path / 'corpus')}", "launcher.partition=worn"]
    if "runtime=cpu" in more:  # nodes that are only switched off
        words = [*TINY, "launcher.account=physics", "launcher.time_limit_min=30"]
    assert submit.run(["--dry-run", *words, f"run_dir={tmp_path}/run", *more]) == 0
    text = capsys.readouterr().out
    assert told in text
    assert ("the job waits" in text) == bool(told)


def test_gpus_and_nodes_without_ranks_are_paid_for(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("data=indexed", f"data.dir={_prepared(tmp_path / 'corpus')}", "train.steps=1_000_000_000")

    def cost(*more: str) -> tuple[int, str]:
        assert submit.run(["--dry-run", *TINY, *long, f"run_dir={tmp_path}/run", *more]) == 0
        text = capsys.readouterr().out
        found = re.search(r"cost +\$([\d,]+) at \$2 for a GPU and hour", text)
        assert found, text
        return int(found[1].replace(",", "")), text

    (all_used, _), (half, text) = cost(), cost("launcher.gpus_per_node=4")
    assert half == pytest.approx(2 * all_used, rel=1e-3)
    assert "with the 4 of 8 GPUs that have no rank" in text
    _, text = cost("parallel.dp=8", "launcher.min_nodes=2", "launcher.fallbacks=[{parallel:{dp:2}}]")
    assert "at most 5 of 7 nodes, $20 an hour" in text


def test_the_controller_is_asked_as_the_job_would_be_submitted(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from within another job, or with a rank's variables: none of them is the new job's."""
    for name, value in {"SLURM_JOB_ID": "9", "RANK": "8", "SLURM_CONF": "here"}.items():
        monkeypatch.setenv(name, value)
    assert submit.run(["--dry-run", *TINY, f"run_dir={tmp_path}/run"]) == 0
    assert Path(f"{cluster}.asked").read_text() == "ours here\n"


def test_gpus_where_there_are_none(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        submit.run([*TINY, "launcher.partition=small", "launcher.account=physics", "launcher.time_limit_min=30"]) == 2
    )
    assert "no node of partition small has a GPU; use another launcher.partition" in capsys.readouterr().err


def test_a_dry_run_of_2048_gpus_says_what_they_are_for(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _prepared(tmp_path / "corpus")
    words = ["--dry-run", *V3[:-1], f"data.dir={data}", f"run_dir={tmp_path}/v3"]
    assert submit.run(words) == 0
    text = capsys.readouterr().out
    for expected in (
        "256 x 8 = 2,048 ranks",
        "ep: 32 of 64 ranks, each over 8 nodes, 1 on a node",
        "pp: 128 of 16 ranks, each over 16 nodes, 8 on a node",
        "71.1 GiB on the peak rank (stage 0 of 16), of 78.6",
        "predicted for cluster=h800 at an MFU of ",
        "at $2 for a GPU and hour",
        "sbatch --parsable --job-name=moe-deepseek_v3 --nodes=256 --ntasks-per-node=8 --gpus-per-node=8 --time=1440",
        "--signal=B:USR1@300 --requeue",
        "--exclusive --mem=0",
        "experiment=deepseek_v3/pretrain",
    ):
        assert expected in text
    found = re.search(r"time +([\d,.]+) hours: .*\n.*\n +(\d+) x the time limit of 24 hours", text)
    assert found, text
    assert int(found[2]) == math.ceil(float(found[1].replace(",", "")) / 24)
    assert not cluster.exists()
    assert not (tmp_path / "v3").exists()


def test_a_dry_run_says_what_the_data_are(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """90 % of 20T tokens are trained on; of a tokenizer of 1,000 entries most rows of the model have no token."""
    words = ["--dry-run", *V3[:-1], f"data.dir={_prepared(tmp_path / 'corpus')}", f"run_dir={tmp_path}/v3"]
    assert submit.run(words) == 0
    text = capsys.readouterr().out
    assert "corpus: 18,000,000,000,000 tokens to train on, read 0.82 times, tokenizer of 1,000 entries" in text
    assert "128,280 of 129,280 rows of the vocabulary (model.vocab_size) have no token" in text
    _prepared(tmp_path / "corpus", 1_500_000_000_000)
    assert submit.run(words) == 0
    assert "note    11.0 epochs: repeated data add little after 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data", [["data=indexed", "data.dir=later"], ["data=text", "data.path=later.txt", "data.dir=none"],
             ["data=text", "data.path=later/*.txt", "data.dir=none"],
             ["data=indexed", "data.blend=[{path:later,weight:1.0}]"]]
)  # fmt: skip
def test_a_dry_run_needs_no_data(
    data: list[str], cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes, memory, time and cost are shown, and a note; a submission is refused."""
    words = ["experiment=deepseek_v3/pretrain", "launcher.scratch_dir=null", *data, f"run_dir={tmp_path}/v3"]
    assert submit.run(["--dry-run", *words]) == 0
    text = capsys.readouterr().out
    for expected in ("256 x 8 = 2,048 ranks", "GiB on the peak rank", "hours: a step", "cost    $", "sbatch"):
        assert expected in text
    assert "note    the data are not checked: data." in text
    assert submit.run(words) == 2
    assert "later" in capsys.readouterr().err


def test_a_blend_is_counted(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the size of its .bin files: 2 bytes a token in one, 4 in the other."""
    for name, code, size in (("a", 8, 400_000), ("b", 4, 800_000)):
        (tmp_path / f"{name}.bin").write_bytes(bytes(size))
        (tmp_path / f"{name}.idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([code]) + bytes(16))
    words = ["--dry-run", *TINY, "data=indexed", "data.blend=[{path:a,weight:0.5},{path:b,weight:0.5}]",
             f"run_dir={tmp_path}/run"]  # fmt: skip
    assert submit.run(words) == 0
    assert "2 datasets: 360,000 tokens to train on, read 0.028 times" in capsys.readouterr().out
    (tmp_path / "a.idx").write_bytes(b"nothing")
    assert submit.run(words) == 2
    assert "a.idx is not an index of a Megatron dataset" in capsys.readouterr().err


def test_nvfp4_has_a_time_and_a_cost(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    for precision in ("mxfp8", "nvfp4"):
        words = ["--dry-run", *V3[:-1], f"data.dir={_prepared(tmp_path / 'corpus')}", f"run_dir={tmp_path}/v3",
                 "cluster=b200", f"precision={precision}"]  # fmt: skip
        assert submit.run(words) == 0
        text = capsys.readouterr().out
        found = re.search(r"cost +\$([\d,]+) at", text)
        assert found, text
        costs.append(found[1])
    assert costs[0] == costs[1]
    assert "note    time and cost are those of MXFP8: NVFP4, which is faster, is not timed" in text


def test_a_large_model_trains_in_bf16_where_nothing_is_said(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As moe-memory and moe-plan assume; the job is told. What was chosen by name is not refused."""
    words = ["--dry-run", "model=qwen3_30b_a3b", "parallel.pp=2", "parallel.dp=32", "parallel.ep=8", "cluster=h200",
             "train.seq_length=128", "optimizer.lr=1e-3", "batch=small", "batch.global_batch_size=64",
             "train.steps=100", "data=stdlib", f"run_dir={tmp_path}/run"]  # fmt: skip
    assert submit.run(words) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "qwen3_30b_a3b in bf16" in text
    assert " precision=bf16 " in text.splitlines()[-1]
    assert submit.run([word for word in words if not word.startswith("optimizer")]) == 2
    assert "would train with defaults for a laptop: optimizer.lr=0.001; use" in capsys.readouterr().err
    few = ["model=qwen3_30b_a3b", "parallel.dp=64", "parallel.ep=8", "batch.global_batch_size=64"]
    assert submit.run([*few, f"run_dir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: qwen3_30b_a3b on 64 GPUs would train with defaults for a laptop: train.seq_length=128, "
        "optimizer.lr=0.001, data.source=stdlib, train.tokens=null; use experiment=qwen3_30b_a3b/pretrain, or give "
        "each of them"
    )


def test_weights_of_another_model_are_refused(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By config.json, before nodes are asked for."""
    model = compose(["model=tiny"]).model
    (tmp_path / "weights").mkdir()
    words = ["--dry-run", *TINY, "init_from=weights", f"run_dir={tmp_path}/run"]
    for layers, code in ((2, 2), (4, 0)):
        config = hf_config.to_hf(replace(model, num_layers=layers), "bf16")
        (tmp_path / "weights/config.json").write_text(json.dumps(config))
        found = submit.run(words)
        errors = capsys.readouterr().err
        assert bool(found) == bool(code), errors
        assert ("is of another model: model.num_layers=2 there, model.num_layers=4 in the run" in errors) == bool(code)


def test_a_run_that_is_continued_keeps_its_precision(tmp_path: Path) -> None:
    """BF16 is for new runs: the command line would change that of one that began in FP8."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("precision: {name: fp8_block}\n")
    assert submit._assumed(["model=tiny", f"run_dir={tmp_path}/new"]) == ["runtime=cuda", "precision=bf16"]
    places = (f"run_dir={tmp_path}/old", f"run_dir='{tmp_path}/old'", f"++run_dir={tmp_path}/old")
    for words in (*([place] for place in places), ["resume=/somewhere", "run_dir=new"]):
        assert submit._assumed(words) == ["runtime=cuda"]


def test_files_of_config_dir_go_with_the_job(cluster: Path, tmp_path: Path) -> None:
    """The job reads the copy of the submission, also when the directory has changed."""
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment/mine.yaml").write_text("# @package _global_\ntrain: {steps: 30}\n")
    (own / "notes.bin").write_bytes(b"not YAML")
    assert submit.run(["--config-dir", "own", *TINY[:-2], "experiment=mine", f"run_dir={tmp_path}/run"]) == 0
    kept = next((tmp_path / "run/submissions").iterdir())
    words = cluster.read_text().splitlines()
    assert f"--config-dir={kept}/conf" in words
    assert (kept / "conf/experiment/mine.yaml").read_text() == (own / "experiment/mine.yaml").read_text()
    assert not (kept / "conf/notes.bin").exists()
    script = words.index(f"--config-dir={kept}/conf")
    shown = subprocess.run(
        [sys.executable, "-m", "launch.main", *words[script:], "--cfg", "job"], cwd=tmp_path, capture_output=True,
        text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert "  steps: 30" in shown.stdout, shown.stderr


def test_what_is_submitted_is_kept(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    words = [*TINY, f"run_dir={run_dir}", "launcher.exclude=[node3,node4]", "launcher.exclusive=false"]
    words += ["launcher.memory_gib=64"]
    assert submit.run(["--dry-run", *words]) == 0
    assert "may give each rank one core" in capsys.readouterr().out
    words += ["launcher.cpus_per_rank=6"]
    assert submit.run(words) == 0
    text = capsys.readouterr().out
    assert "submitted 71; follow with" in text
    assert "one core" not in text
    code, *arguments = cluster.read_text().splitlines()
    kept = next((run_dir / "submissions").iterdir())
    assert Path(code) == kept / "code"
    assert (kept / "code/moe_train/train.py").read_bytes() == (ROOT / "moe_train/train.py").read_bytes()
    assert (kept / "code/conf/train.yaml").exists()
    assert "num_layers" in (kept / "config.yaml").read_text()
    assert {"--nodes=2", "--ntasks-per-node=2", "--exclude=node3,node4"} <= set(arguments)
    assert {"--oversubscribe", "--mem=64G", "--cpus-per-task=6"} <= set(arguments)
    overrides = arguments[arguments.index(f"{code}/launch/train.sbatch") + 1 :]
    assert [word.replace("'", "") for word in overrides] == [
        *TINY, *words[-4:], "runtime=cuda", "precision=bf16", f"run_dir={run_dir}",
    ]  # fmt: skip
    assert json.loads((kept / "submission.json").read_text())["jobs"] == ["71"]


def test_jobs_whose_numbers_cannot_be_written_down_are_named(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of a chain, on a disk that is full by then: what was written of the first stays."""
    replace, calls = os.replace, []

    def full(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert submit.run([*TINY, f"run_dir={tmp_path}/run", "launcher.chain=2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: jobs 71 72 are submitted, but ")
    assert "submission.json cannot be written: No space left on device; " in said
    assert said.endswith("or scancel 71 72 and submit again\n")
    place = next((tmp_path / "run/submissions").iterdir())
    assert json.loads((place / "submission.json").read_text())["jobs"] == ["71"]
    assert not list(place.glob(".submission.json*"))


def test_each_job_of_a_chain_waits_for_all_before_it(cluster: Path, tmp_path: Path) -> None:
    """Slurm cancels the one that waits for a job that completes, and takes a cancelled job for one that failed."""
    assert submit.run([*TINY, f"run_dir={tmp_path}/run", "launcher.chain=3", "launcher.dependency=afterok:9"]) == 0
    lines = [line for line in cluster.read_text().splitlines() if "--dependency" in line or "requeue" in line]
    assert lines == ["--dependency=afterok:9", "--no-requeue"] + [
        text for jobs in ("71", "71:72") for text in (f"--dependency=afternotok:{jobs}", "--no-requeue")
    ]


def test_a_sweep_is_one_array(cluster: Path, tmp_path: Path) -> None:
    words = ["-m", *TINY, "seed=1,2,3", f"run_dir={tmp_path}/sweep", "launcher.array_limit=2"]
    assert submit.run(words) == 0
    arguments = cluster.read_text().splitlines()
    assert "--array=0-2%2" in arguments
    kept = next((tmp_path / "sweep/submissions").iterdir())
    for number in range(3):
        overrides = (kept / "sweep" / str(number)).read_text().split("\0")
        assert f"seed={number + 1}" in overrides
        assert f"run_dir={tmp_path}/sweep/{number}" in overrides


def test_a_job_of_a_sweep_that_is_wrong_stops_all_of_them(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.run(["-m", *TINY, "parallel.tp=1,3", f"run_dir={tmp_path}/sweep"]) == 2
    assert "error: job 1: parallel.tp=3" in capsys.readouterr().err
    assert not cluster.exists()


def test_jobs_that_ask_for_different_things_are_no_array(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One request would give the others too few nodes, or another time."""
    for sweep in ("launcher.time_limit_min=60,600", "parallel.dp=2,4"):
        assert submit.run(["-m", *TINY, sweep, f"run_dir={tmp_path}/sweep"]) == 2
        assert "an array has one request for all" in capsys.readouterr().err
    assert not cluster.exists()


def test_status_cancel_and_logs(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    for verb in ("status", "cancel", "logs"):
        assert submit.run([verb, str(run_dir)]) == 2
        assert "is not the directory of a run that moe-submit started" in capsys.readouterr().err
    submit.run([*TINY, f"run_dir={run_dir}"])
    Path(f"{cluster}.state").write_text("RUNNING")
    (run_dir / "logs").mkdir()
    (run_dir / "logs/node1.log").write_text("step 7/10\n")
    (run_dir / "metrics.jsonl").write_text('{"step": 7, "lm_loss": 3.5, "tokens_per_s": 1234.5}\n{"st')
    (run_dir / "config.yaml").write_text((next((run_dir / "submissions").iterdir()) / "config.yaml").read_text())
    capsys.readouterr()
    assert submit.run(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "job 71: running, on node[1-2], for 00:01:00" in shown
    assert "step 7 of 10, loss 3.5000, 1,234 tokens/s" in shown
    assert submit.run(["logs", str(run_dir)]) == 0
    assert "step 7/10" in capsys.readouterr().out
    assert submit.run([*TINY, f"run_dir={run_dir}"]) == 2
    assert "belongs to job 71, which has not ended" in capsys.readouterr().err
    assert submit.run(["cancel", str(run_dir)]) == 0
    assert cluster.read_text().splitlines()[-1] == "scancel 71"
    Path(f"{cluster}.state").write_text("CANCELLED")
    assert submit.run(["cancel", str(run_dir)]) == 2


def test_it_starts_quickly_and_without_torch(tmp_path: Path) -> None:
    """2,048 GPUs take longest."""
    words = [*V3[:-1], f"data.dir={_prepared(tmp_path / 'corpus')}", f"run_dir={tmp_path}/run"]
    code = "from launch.slurm import submit; sys.exit(submit.run(['--dry-run', *sys.argv[1:]]))"
    calls, slow = startup(code, *words, directory=tmp_path)
    assert slow == []
    assert calls < 2_200_000


def test_groups_on_their_nodes() -> None:
    layout = ParallelLayout.resolve(tp=2, pp=2, vpp=1, cp=1, ep=4, etp=1, dp=4)
    found = {one.name: (one.size, one.groups, one.nodes, one.per_node) for one in node_spans(layout, 4)}
    # Ranks 0-3, 4-7 | 8-11, 12-15 are nodes; a stage is eight ranks; tp pairs neighbours.
    assert found == {"tp": (2, 8, 1, 2), "ep": (4, 4, 1, 1), "dp": (4, 4, 2, 2), "pp": (2, 8, 2, 4)}
    lines = [str(one) for one in node_spans(layout, 4)]
    assert "tp: 8 of 2 ranks, each within a node, 2 on a node" in lines
    assert "dp: 4 of 4 ranks, each over 2 nodes, 2 on a node" in lines


@pytest.mark.parametrize("name", ["epoch=9", "a b, c", "ü [1]{2}", "2024_01_02", "it's", "100%"])
def test_the_job_reads_the_paths_that_were_submitted(
    name: str, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absolute, without references, and the log of Slurm goes into the same directory."""
    monkeypatch.setenv("PLACE", name)
    words = [*TINY, f"run_dir={name}/${{model.name}}", "data.dir=${oc.env:PLACE}/data", "resume=never"]
    assert submit.run(words) == 0
    _, *arguments = cluster.read_text().split("\n")
    script = next(i for i, word in enumerate(arguments) if word.endswith("train.sbatch"))
    job = [word for word in arguments[script + 1 :] if word]
    cfg = compose(job)
    assert (cfg.run_dir, cfg.data.dir) == (str(tmp_path / name / "tiny"), str(tmp_path / name / "data"))
    assert cfg.resume == "never"
    assert job[-1] == f"run_dir={cfg.run_dir}", "the batch script reads it without Python"
    assert f"--output={cfg.run_dir.replace('%', '%%')}/slurm-%j.out" in arguments


def test_a_directory_that_another_run_writes_is_refused(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock.held(Config(run_dir="run")):
        assert submit.run([*TINY, "run_dir=run"]) == 2
    assert f"run_dir={tmp_path / 'run'} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not cluster.exists()
    assert submit.run([*TINY, "run_dir=run"]) == 0


@pytest.mark.parametrize("name", ["a:b", "a\nb"])
def test_a_directory_that_a_job_cannot_use_is_refused(
    name: str, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.run([*TINY, f"run_dir={name}"]) == 2
    assert "with which a batch job cannot start; choose another run_dir" in capsys.readouterr().err
    assert not cluster.exists()


@pytest.mark.parametrize("nodes", [2, 200])
def test_the_remedy_for_a_number_of_nodes_can_be_submitted(nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ranks fit their GPUs too; following one hint does not lead to another that undoes it."""
    cfg = compose(["experiment=deepseek_v3/pretrain", "runtime=cuda", f"launcher.nodes={nodes}"])
    with pytest.raises(ConfigError) as first:
        validate(cfg, 8 * nodes)
    assert str(node_count.refused(cfg, first.value)).endswith("; use launcher.nodes=256")
    assert submit.run([*V3, f"launcher.nodes={nodes}", "--dry-run"]) == 2
    assert capsys.readouterr().err.endswith("; use launcher.nodes=256\n")
