"""Numbers that would become others without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parallel.errors import CheckpointError
from tests.conversion import models
from tests.conversion.convert import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    models.save("llama", tmp_path / "hf")
    return tmp_path / "hf"


def test_a_number_beyond_fp16_is_named(source: Path, tmp_path: Path) -> None:
    models.edit(source, lambda held: held["model.layers.1.mlp.up_proj.weight"].view(-1)[3].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has 1e\+06, and fp16 ends at 65504"):
        convert(source, tmp_path / "out", dtype="fp16")
    convert(source, tmp_path / "out", dtype="bf16")


def test_an_infinity_is_no_fp8_number(source: Path, tmp_path: Path) -> None:
    """It would become 448."""
    models.edit(source, lambda held: held["model.layers.1.mlp.up_proj.weight"].view(-1)[3].fill_(-torch.inf))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 infinite numbers"):
        convert(source, tmp_path / "out", to="hf", dtype="fp8")


def test_integers_are_no_weights(source: Path, tmp_path: Path) -> None:
    models.edit(source, lambda held: held.update({"lm_head.weight": held["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is int8"):
        convert(source, tmp_path / "out")


def test_an_index_that_names_another_file_is_noticed(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "many", to="hf", file_gb=0.0001)
    (tmp_path / "many" / "manifest.json").unlink()
    index = tmp_path / "many" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    files = sorted(set(table["weight_map"].values()))
    table["weight_map"]["model.norm.weight"] = next(f for f in files if f != table["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in model-\d+.* and .*index\.json says"):
        convert(tmp_path / "many", tmp_path / "out")


def test_fp8_blocks_of_another_size_are_refused(source: Path, tmp_path: Path) -> None:
    models.edit(source, lambda held: None, quantization_config={"weight_block_size": [64, 64]})
    with pytest.raises(CheckpointError, match=r"weight_block_size=\[64, 64\]"):
        convert(source, tmp_path / "out")
