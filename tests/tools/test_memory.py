"""`moe-memory`: a table on a login node, without torch, in less than a second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.startup import startup
from tools.memory import with_defaults

COMMAND = Path(sys.executable).parent / "moe-memory"
V3 = ("model=deepseek_v3", "parallel=deepseek_v3_h800", "precision=fp8_block", "recompute=deepseek_v3")


def memory(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return forked.run([COMMAND, *overrides], cwd=directory, capture_output=True, text=True, timeout=60)


def test_every_stage_of_deepseek_v3_fits_80_gb(tmp_path: Path) -> None:
    done = memory(tmp_path, *V3)
    assert done.returncode == 0, done.stderr
    assert "every stage fits a GPU of 80 GiB (cluster=h100, h800)" in done.stdout, "an A100 has no FP8"
    for text in ("stage 0", "stage 15", "tmL", "Et*4", "parameters", "optimizer", "logits", "GiB"):
        assert text in done.stdout
    cache = {
        row[0]: row[1:] for line in done.stdout.splitlines() if (row := [x.strip() for x in line.split("│")[1:-1]])
    }
    assert cache["bf16"][0] == "70,272"
    assert cache["fp8"][:2] == ["40,016", "2,624"]  # 4 layers of 656 bytes
    assert cache["bf16, all heads"][0] == "4,997,120"
    assert "KV cache at inference, sequences of 4,096 tokens. Stage 0 of 16 limits it: of 78.60 GiB" in done.stdout


def test_the_cache_is_asked_for_by_context_and_format(tmp_path: Path) -> None:
    words = ("model=qwen3_30b_a3b", "parallel.ep=8", "parallel.dp=8", "engine.context_length=16k")
    done = memory(tmp_path, *words, "engine.cache_format=fp8")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("│ fp8")]
    _, each, of_rank, tokens, sequences = (cell.strip().replace(",", "") for cell in row.split("│")[1:-1])
    assert int(each) == int(of_rank) == 48 * 4 * 2 * (128 + 4)
    assert int(sequences) == int(tokens) // 16384 > 1
    assert "│ bf16" not in done.stdout
    small = memory(tmp_path, *words, "cluster.memory_gib=8")
    assert "GiB are missing" in small.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["engine.context_length=8k"],
            "engine.context_length=8192 exceeds model.max_position_embeddings=4096; use engine.context_length=4",
        ),
        (
            ["engine.rotary_format=fp8"],
            "engine.rotary_format=fp8 has no effect with model.attention=gqa; use engine.rotary_format=null",
        ),
        (["engine.cache_format=fp9"], "engine.cache_format=fp9 is not one of fp32, bf16, fp16, fp8, int8, int4"),
        (["engine.block_size=0"], "engine.block_size=0 is below the smallest value 1"),
    ],
)
def test_a_cache_that_the_model_cannot_have_is_refused(tmp_path: Path, words: list[str], told: str) -> None:
    done = memory(tmp_path, "model=olmoe_7b", *words)
    assert (done.returncode, done.stderr.startswith(f"error: {told}")) == (2, True), done.stderr


def test_a_cluster_that_is_too_small_is_said_first(tmp_path: Path) -> None:
    words = ("model=qwen3_30b_a3b", "parallel.ep=8", "parallel.dp=8", "batch.global_batch_size=1024")
    small, large = memory(tmp_path, *words, "cluster=h800"), memory(tmp_path, *words, "cluster=b200")
    assert (
        "GiB; more than the 78.6 GiB that torch gets of the 80 of cluster=h800; every stage fits a GPU" in small.stdout
    )
    assert "more than" not in large.stdout


def test_a_small_model_on_the_cpu_is_in_mib(tmp_path: Path) -> None:
    done = memory(tmp_path, "runtime=cpu", "model=tiny", "train.seq_length=128", "parallel.pp=2")
    assert done.returncode == 0, done.stderr
    assert "micro-batches of 1 x 128 tokens: MiB of one rank" in done.stdout


def test_it_starts_quickly_and_without_torch(tmp_path: Path) -> None:
    calls, slow = startup("from tools import memory; memory.main()", *V3, directory=tmp_path)
    assert slow == []
    assert calls < 1_500_000


def test_a_wrong_configuration_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = memory(tmp_path, "model=llama3_8b", "recompute=selective", "recompute.modules=[mla_up_proj]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recompute.modules has mla_up_proj, but model.attention=gqa")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "added"),
    [
        ([], ["runtime=cuda", "precision=bf16", "batch=large", "train.seq_length=4096"]),
        (["precision=fp8_block"], ["runtime=cuda", "batch=large", "train.seq_length=4096"]),
        (["precision.dtype=fp32"], ["runtime=cuda", "batch=large", "train.seq_length=4096"]),
        (["runtime=cpu", "batch.global_batch_size=8"], ["train.seq_length=4096"]),
        (["experiment=tiny_tp2_pp2_ep2"], ["runtime=cuda"]),
        (["batch=small", "train.seq_length=128", "++runtime=cuda"], ["precision=bf16"]),
    ],
)
def test_what_is_given_is_not_assumed(words: list[str], added: list[str]) -> None:
    assert with_defaults(words) == [*added, *words]
