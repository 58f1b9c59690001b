"""What `save_pretrained` of transformers 5 writes in its own layout: 3-D experts, and Mixtral's router in `mlp`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moe_train.conversion import difference, inventory
from parallel.errors import CheckpointError
from tests.conversion import models
from tests.conversion.convert import convert

NAMES = tuple(name for name in models.IN_TRANSFORMERS if name not in models.DENSE)


def save_both(name: str, root: Path) -> tuple[Path, Path]:
    """The same model in the layout of the releases and in that of transformers' modules."""
    model = models.build(name)
    model.save_pretrained(root / "released")
    model.save_pretrained(root / "modules", save_original_format=False)
    return root / "released", root / "modules"


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_transformers_modules_holds_the_same_weights(name: str, tmp_path: Path) -> None:
    released, modules = save_both(name, tmp_path)
    names = models.tensors(modules).keys()
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in names)
    assert not any("block_sparse_moe" in key for key in names)
    for source in (released, modules):
        convert(source, tmp_path / f"{source.name}-megatron")
        convert(source, tmp_path / f"{source.name}-hf", to="hf")
    assert not difference.compare(tmp_path / "released-megatron", tmp_path / "modules-megatron", 2).differences
    assert not difference.compare(released, modules, 2).differences
    back = models.tensors(tmp_path / "modules-hf")
    for key, tensor in models.tensors(released).items():
        assert torch.equal(tensor, back[key]), key
    found = inventory.take(modules)
    assert found.elements == inventory.take(released).elements


def test_a_tensor_in_two_layouts_is_refused(tmp_path: Path) -> None:
    """Which of them counts would be a guess."""
    _, modules = save_both("mixtral", tmp_path)
    twice = shutil.copytree(modules, tmp_path / "twice")
    gate = "model.layers.1.mlp.gate.weight"
    models.edit(
        twice,
        lambda held: held.update({gate.replace("mlp", "block_sparse_moe"): torch.zeros_like(held[gate])}),
    )
    with pytest.raises(CheckpointError, match=rf"has a tensor {gate}, and a mixtral model"):
        convert(twice, tmp_path / "out")
