"""`moe-train` writes Hugging Face weights at its end and starts from them, as a user would have it do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.parity import COMMON
from launch.failures import RankError
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.data.datasets import build_datasets
from moe_train.data.prepare import prepare

STEPS = 2
SHORT = [
    "train.steps=2", "train.seq_length=32", "schedule.warmup_steps=1", "model.hidden_size=64", "model.vocab_size=515",
    "model.ffn_hidden_size=128", "model.moe_ffn_hidden_size=32", "batch.global_batch_size=4",
    "checkpoint.save_at_end=true", "train.eval_batches=2",
]  # fmt: skip


def train(run_dir: Path, *overrides: str) -> list[float]:
    """Validation losses, first to last."""
    cfg = compose([*COMMON, *SHORT, *overrides, f"run_dir={run_dir}"])
    launcher.start(cfg, validate(cfg))
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


@pytest.fixture(scope="module")
def trained(small_data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The exported directory of a run on expert- and tensor-parallel ranks, and its last validation loss."""
    run_dir = tmp_path_factory.mktemp("run")
    losses = train(run_dir, *small_data, "parallel.ep=2", "parallel.tp=2", "export_hf=true")
    return run_dir / "hf" / f"step_{STEPS:08d}", losses[-1]


def test_another_layout_starts_where_the_run_ended(
    trained: tuple[Path, float], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    directory, last = trained
    first = train(tmp_path, *small_data, "parallel.pp=2", f"init_from={directory}")[0]
    assert first == pytest.approx(last, rel=1e-6)
    untrained = train(tmp_path / "afresh", *small_data, "train.steps=1")[0]
    assert abs(untrained - last) > 1e-4, "or the equality above says nothing"


def held_out(run_dir: Path, *overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [samples, s] of the evaluations of `train`."""
    cfg = compose([*COMMON, *SHORT, *overrides, f"run_dir={run_dir}"])
    batch = cfg.batch.global_batch_size
    _, valid, _ = build_datasets(cfg, STEPS * batch, cfg.train.eval_batches * batch, 0)
    samples = [valid[i] for i in range(cfg.train.eval_batches * batch)]
    tokens, labels = (
        torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in ("tokens", "labels")
    )
    return tokens, labels


def test_transformers_reads_the_export_and_has_its_loss(
    trained: tuple[Path, float], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    """On the held-out text of the run. The vocabulary of 515 is padded to 640 rows, which must not count."""
    directory, last = trained
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(key.startswith("model.layers.4.") for key in report["unexpected_keys"]), "prediction layers only"
    assert (directory / "tokenizer.json").is_file()
    tokens, labels = held_out(tmp_path, *small_data)
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.size(-1) == 515
    assert float(cross_entropy(logits.flatten(0, 1), labels.flatten())) == pytest.approx(last, rel=1e-5)


def test_a_conversion_of_the_run_has_the_tokenizer_too(trained: tuple[Path, float], tmp_path: Path) -> None:
    directory, _ = trained
    command = [Path(sys.executable).parent / "moe-convert", directory.parents[1], tmp_path / "hf"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120, stdout=subprocess.DEVNULL)
    for file in directory.glob("tokenizer*"):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "hf/tokenizer.json").is_file()


def test_another_model_is_refused_with_the_settings_to_use(
    trained: tuple[Path, float], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    directory, _ = trained
    with pytest.raises(RankError, match=r"is of another model: .*set model\.topk=4") as caught:
        train(tmp_path, *small_data, "model.topk=2", f"init_from={directory}")
    assert caught.value.exit_code == 2


def test_damaged_weights_are_not_trained_on(
    trained: tuple[Path, float], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    """The export has a manifest, which one flipped bit of a weight contradicts."""
    damaged = shutil.copytree(trained[0], tmp_path / "damaged")
    file = next(damaged.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(RankError, match=rf"{file.name} is damaged: .*restore the file from a copy") as caught:
        train(tmp_path / "run", *small_data, f"init_from={damaged}")
    assert caught.value.exit_code == 2


def test_where_checkpoints_cannot_go_is_said_before_the_first_step(small_data: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for field in ("checkpoint.dir", "checkpoint.local_dir"):
        with pytest.raises(RankError, match=rf"cannot write to {tmp_path}/file/.* set {field}$") as caught:
            train(tmp_path / "run", *small_data, f"{field}={tmp_path}/file/there")
        assert caught.value.exit_code == 2
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_trained_model_ends_its_texts_by_itself(tmp_path: Path) -> None:
    """Short documents of one form, which even a tiny model learns to end."""
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": f"The number {n} is followed by {n + 1}."}) for n in range(2000)]
    (tmp_path / "text" / "numbers.jsonl").write_text("\n".join(lines))
    data = ("data=text", f"data.path={tmp_path}/text", f"data.dir={tmp_path}/data", "data.tokenizer_vocab_size=300")
    prepare(compose([*data, "data.prepare_workers=1"]).data, 512, progress=False)
    steps = ("train.steps=250", "optimizer.lr=5e-3", "schedule.warmup_steps=20", "batch.global_batch_size=8")
    train(tmp_path / "run", *data, *steps, "train.seq_length=64", "export_hf=true")
    directory = tmp_path / "run" / "hf" / "step_00000250"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The number 7", return_tensors="pt")
    found = model.generate(**prompt, max_new_tokens=200, do_sample=False)[0].tolist()
    assert found[-1] == tokenizer.eos_token_id
    assert len(found) < 100
    text = tokenizer.decode(found, skip_special_tokens=True)
    assert re.fullmatch(r"The number 7\d* is followed by \d+\.", text)  # which number it is takes longer to learn
