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
