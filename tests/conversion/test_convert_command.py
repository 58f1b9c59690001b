"""What `moe-convert` takes and makes: forms of the source, copies of a run's checkpoint, paths, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import checkpoint
from moe_train.formats import dcp
from parallel.errors import CheckpointError
from tests.checkpoint import small_run
from tests.conversion import tiny_v3
from tests.conversion.tiny_v3 import EXPERTS, Command, Tensors, files_of, same_bits
from tests.distributed.helper import run_distributed
from tests.launch.programs import ROOT, environment


def megatron(directory: Path) -> Tensors:
    """Every tensor of a Megatron checkpoint; expert by expert where it stacks them."""
    stored = dcp.Checkpoint(directory)
    found: Tensors = {}
    for key, entry in stored.tensors.items():
        size = tuple(entry.size)
        for index in range(size[0]) if len(size) == 3 else (None,):
            rows = stored.read(key, index, 0, size[index is not None])
            found[key if index is None else f"{key}[{index}]"] = rows.tensor()
    return found


def assert_same(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not same_bits(a[name], b[name])] == []


def fused(tensors: Tensors, suffix: str = "") -> Tensors:
    """The form with one tensor for all experts of a layer: gate and up [E, 2I, H], down [E, H, I]."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = [[tensors[f"{prefix}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")] for e in range(EXPERTS)]
        found[f"{prefix}gate_up_proj{suffix}"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in parts])
        found[f"{prefix}down_proj{suffix}"] = torch.stack([down for *_, down in parts])
    return found


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_experts_are_the_same_checkpoint(suffix: str, tmp_path: Path, convert: Command) -> None:
    weights = tiny_v3.weights(1)
    convert.well(tiny_v3.write(tmp_path / "each", weights), tmp_path / "a")
    convert.well(tiny_v3.write(tmp_path / "fused", fused(weights, suffix)), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    convert.well(tmp_path / "b", tmp_path / "back")
    assert_same(tiny_v3.read(tmp_path / "back"), weights)


def test_moving_bytes_imports_no_torch(tmp_path: Path) -> None:
    """Both ways and with the check of a manifest: importing it takes as long as converting two gigabytes.

    numpy, which looks for numbers that are not finite, takes a tenth of a second.
    """
    source = tiny_v3.write(tmp_path / "hf", tiny_v3.weights(1))
    code = (
        "import sys; from tools.convert import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "slow = {'torch', 'megatron', 'transformers', 'tokenizers', 'safetensors', 'scipy', 'pandas', 'matplotlib'}\n"
        "sys.exit(code or sorted(slow & sys.modules.keys()) or 0)"
    )
    steps = [(source, "megatron"), (tmp_path / "megatron", "back"), (tmp_path / "back", "again")]
    steps += [(tmp_path / "megatron", "copy", "convert.to=megatron")]
    for step_source, target, *words in steps:
        command = [sys.executable, "-c", code, str(step_source), str(tmp_path / target), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert_same(megatron(tmp_path / "again"), megatron(tmp_path / "copy"))


def test_one_file_and_several_are_the_same_checkpoint(tmp_path: Path, convert: Command) -> None:
    weights = tiny_v3.weights(2)
    convert.well(tiny_v3.write(tmp_path / "one", weights), tmp_path / "a")
    convert.well(tiny_v3.write(tmp_path / "several", weights, files=7), tmp_path / "b", "convert.threads=3")
    no_index = tiny_v3.write(tmp_path / "no-index", weights, files=3)
    (no_index / "model.safetensors.index.json").unlink()
    convert.well(no_index, tmp_path / "c")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_tied_embeddings_and_a_padded_vocabulary(tmp_path: Path, convert: Command) -> None:
    """Without multi-token prediction. The padding is zeros in Megatron and nowhere in Hugging Face."""
    weights = {n: t for n, t in tiny_v3.weights(3).items() if not n.startswith("model.layers.2.")}
    tied = {n: t for n, t in weights.items() if n != "lm_head.weight"}
    changes = {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    convert.well(tiny_v3.write(tmp_path / "hf", tied, **changes), tmp_path / "megatron")
    found = megatron(tmp_path / "megatron")
    assert "output_layer.weight" not in found
    embedding = found["embedding.word_embeddings.weight"]
    assert embedding.shape[0] % 128 == 0
    assert embedding.shape[0] > tiny_v3.VOCABULARY
    assert same_bits(embedding[: tiny_v3.VOCABULARY], tied["model.embed_tokens.weight"])
    assert not embedding[tiny_v3.VOCABULARY :].any()
    convert.well(tmp_path / "megatron", tmp_path / "back")
    assert_same(tiny_v3.read(tmp_path / "back"), tied)
    # A head that a file holds again is compared.
    copied = tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    convert.well(tiny_v3.write(tmp_path / "copied", copied, **changes), tmp_path / "same")
    assert_same(megatron(tmp_path / "same"), found)
    other = convert(tiny_v3.write(tmp_path / "other", weights, **changes), tmp_path / "never")
    assert other.code == 2
    assert "lm_head.weight differs from model.embed_tokens.weight" in other.err


def test_a_selection_bias_in_bf16_is_fp32_again(tmp_path: Path, convert: Command) -> None:
    weights = tiny_v3.weights(4)
    biases = [name for name in weights if name.endswith("e_score_correction_bias")]
    rounded = {n: t.to(torch.bfloat16) if n in biases else t for n, t in weights.items()}
    convert.well(tiny_v3.write(tmp_path / "hf", rounded), tmp_path / "megatron", "convert.dtype=bf16")
    bias = megatron(tmp_path / "megatron")["decoder.layers.1.mlp.router.expert_bias"]
    assert same_bits(bias, rounded["model.layers.1.mlp.gate.e_score_correction_bias"].float())
    for dtype in ("bf16", "fp8", "fp32"):
        convert.well(tmp_path / "megatron", tmp_path / dtype, f"convert.dtype={dtype}")
        assert all(tiny_v3.read(tmp_path / dtype)[name].dtype is torch.float32 for name in biases)


def test_strange_paths_and_a_target_called_verify(
    tmp_path: Path, convert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_v3.write(tmp_path / "it's, [odd] {x} ${y}", tiny_v3.weights(5))
    convert.well(source.name, "verify")
    convert.well("verify", "verify")
    convert.well("verify/../verify", "back\\slash")
    assert_same(tiny_v3.read(tmp_path / "back\\slash"), tiny_v3.weights(5))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, "verify", "back\\slash"])


def test_small_files_travel_along(tmp_path: Path, convert: Command) -> None:
    source = tiny_v3.write(tmp_path / "hf", tiny_v3.weights(6))
    convert.well(source, tmp_path / "megatron")
    convert.well(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in tiny_v3.CONFIG} == tiny_v3.CONFIG


# ---- a run's checkpoint ----


def continue_from(run_dir: Path, degrees: small_run.Degrees, changes: dict[str, Any]) -> Any:
    """Losses of the rest of the run, or the line of the error."""
    run = small_run.prepare(small_run.config(run_dir, degrees, **changes))
    try:
        checkpoint.resume(run)
    except CheckpointError as error:
        return [error.exit_code, str(error)]
    return {"losses": small_run.train(run, small_run.STEPS - small_run.HALF), "state": asdict(run.state)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoint of a run at ep2 after half of its steps, and how that run went on."""
    before = run_distributed(small_run.save_halfway, 2, tmp_path_factory.mktemp("run"), {"ep": 2}, {})[0]
    return before["saved"], before


def test_a_copy_keeps_every_moment_and_continues_in_another_layout(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, convert: Command
) -> None:
    saved, before = trained
    copy = tmp_path / "copy"
    convert.well(saved, copy, "convert.to=megatron", "convert.file_gb=0.0001")
    assert len(list(copy.glob("*.distcp"))) > len(list(saved.glob("*.distcp")))
    found = megatron(copy)
    moments = [name for name in found if name.startswith("optimizer.state.exp_avg")]
    assert len(moments) > 100
    assert all(found[name].any() for name in moments)
    assert_same(found, megatron(saved))
    state = json.loads((copy / "state.json").read_text())
    assert state == json.loads((saved / "state.json").read_text())
    assert state["optimizer_updates"] == small_run.HALF
    after = run_distributed(continue_from, 4, tmp_path / "on", {"tp": 2, "pp": 2}, {"resume": str(copy)})
    assert after[0]["state"] == before["state"]
    assert after[0]["losses"] == pytest.approx(before["losses"], rel=1e-4)


def test_a_copy_without_optimizer_starts_runs_and_continues_none(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, convert: Command
) -> None:
    saved, _ = trained
    copy = tmp_path / "copy"
    convert.well(saved, copy, "convert.to=megatron", "convert.optimizer=false", "convert.dtype=bf16")
    found, whole = megatron(copy), megatron(saved)
    model = {name: t for name, t in whole.items() if not name.startswith(("optimizer.", "rng"))}
    biases = {name for name in model if name.endswith("expert_bias")}
    assert len(biases) == 4
    assert_same(found, {n: t if n in biases else t.to(torch.bfloat16) for n, t in model.items()})
    started = run_distributed(continue_from, 1, tmp_path / "a", {}, {"init_from": str(copy)})[0]
    assert started["state"]["step"] == small_run.STEPS - small_run.HALF
    refused = run_distributed(continue_from, 1, tmp_path / "b", {}, {"resume": str(copy)})[0]
    assert refused == [2, f"checkpoint {copy} holds weights only; set init_from={copy}"]


# ---- memory ----

PEAK = """
import re, sys
import torch, safetensors, torch.distributed.checkpoint

def peak():  # getrusage would count the memory of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

base = peak()
from tools import convert
sys.argv = ["moe-convert", *sys.argv[1:]]
try:
    convert.main()
except SystemExit as end:
    assert not end.code, end.code
print((peak() - base) / 1000)
"""


def peak_mb(*words: object) -> float:
    """Memory that a conversion takes beyond the interpreter and torch, MB."""
    command = [sys.executable, "-c", PEAK, *map(str, words), "convert.threads=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def large(directory: Path) -> Path:
    """A checkpoint with an embedding of 300 MB."""
    rows = 750_000
    weights = {n: t for n, t in tiny_v3.weights(7).items() if not n.startswith("model.layers.2.")}
    table = torch.arange(rows * tiny_v3.HIDDEN, dtype=torch.int32).view(rows, -1).remainder_(251).to(torch.bfloat16)
    tied = {n: t for n, t in weights.items() if n != "lm_head.weight"} | {"model.embed_tokens.weight": table}
    assert table.nbytes == 300_000_000
    return tiny_v3.write(directory, tied, vocab_size=rows, tie_word_embeddings=True, num_nextn_predict_layers=0)


def large_feed_forward(directory: Path) -> Path:
    """A checkpoint whose first layer has three matrices of 100 MB."""
    rows = 250_000
    weights = tiny_v3.weights(8)
    matrix = torch.arange(rows * tiny_v3.HIDDEN, dtype=torch.int32).remainder_(251).to(torch.bfloat16)
    for part, shape in {"gate": (rows, -1), "up": (rows, -1), "down": (-1, rows)}.items():
        weights[f"model.layers.0.mlp.{part}_proj.weight"] = matrix.view(shape).clone()
    return tiny_v3.write(directory, weights, intermediate_size=rows)


@pytest.mark.slow
def test_memory_does_not_follow_the_largest_quantised_tensor(tmp_path: Path) -> None:
    source = large_feed_forward(tmp_path / "hf")
    words = {dtype: [f"convert.dtype={dtype}"] for dtype in ("int8", "int4")}
    words["int4"] += ["convert.group_size=8", "convert.keep=[lm_head,'*.kv_b_proj']"]  # of 130 inputs
    peaks = {dtype: peak_mb(source, tmp_path / dtype, "convert.to=hf", *more) for dtype, more in words.items()}
    print(peaks)
    assert all(10 < peak < 400 for peak in peaks.values()), peaks


@pytest.mark.slow
def test_memory_does_not_follow_the_largest_tensor(tmp_path: Path) -> None:
    source = large(tmp_path / "hf")
    peaks = {
        "to megatron": peak_mb(source, tmp_path / "megatron"),
        "to hf": peak_mb(tmp_path / "megatron", tmp_path / "back"),
        "to fp8": peak_mb(source, tmp_path / "fp8", "convert.to=hf", "convert.dtype=fp8"),
        "to fp32": peak_mb(source, tmp_path / "fp32", "convert.to=hf", "convert.dtype=fp32"),
        "copy": peak_mb(tmp_path / "megatron", tmp_path / "copy", "convert.to=megatron"),
    }
    print(peaks)
    assert all(10 < peak < 400 for peak in peaks.values()), peaks
    name = "model.embed_tokens.weight"
    assert same_bits(tiny_v3.read(tmp_path / "back")[name], tiny_v3.read(source)[name])
