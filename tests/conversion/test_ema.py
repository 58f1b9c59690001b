"""`convert.ema`: the EMA of the weights of a run instead of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_train.checkpoint import checkpoint
from moe_train.config.checkpoint_tools import ConvertConfig
from moe_train.config.roots import ConvertRoot
from moe_train.conversion import mapping, plans
from moe_train.formats import dcp, directory_writer, run_config
from moe_train.formats.communicator import SingleProcess
from parallel.errors import CheckpointError
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tools.convert import make_plan

ROUTER = "decoder.layers.1.mlp.router.weight"


def save(run_dir: Path, decay: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Save a checkpoint after two steps; returns the router's weight, and its average."""
    from moe_train.optim.names import global_names

    changes = {"optimizer__ema_decay": decay, "optimizer__lr": 0.01, "schedule__warmup_steps": 0}
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    small_run.train(run, 2)
    checkpoint.save(run)
    router = next(p for p, name in global_names(run.chunks).items() if name == ROUTER)
    weight = router.detach().clone()
    return weight, run.weight_average.averages[router].clone() if decay else weight


def test_the_average_is_converted_without_the_optimizer(tmp_path: Path) -> None:
    ((weight, average),) = run_distributed(save, 1, tmp_path / "run", 0.5)
    assert not torch.equal(weight, average)
    source, target = tmp_path / "run", tmp_path / "average"
    cfg = ConvertRoot(convert=ConvertConfig(to="megatron", ema=True))
    directory_writer.run(make_plan(cfg, source, target), SingleProcess(), 1, lambda done: None)
    written = dcp.Checkpoint(target)
    assert not [key for key in written.tensors if key.startswith(("ema.", "optimizer.", "rng."))]
    stored = dcp.Checkpoint(source / "checkpoints" / "step_00000002")
    pieces = mapping.pieces(run_config.model_of(stored.directory))
    reader = plans.MegatronReader(stored, pieces, ema=True)
    router = next(piece for piece in pieces if piece.key == ROUTER)
    assert reader.key(router) == f"ema.{ROUTER}"
    assert reader.key(next(piece for piece in pieces if piece.key.endswith("expert_bias"))).startswith("decoder.")
    copy = plans.MegatronReader(written, pieces)
    for found in (reader, copy):
        rows = found.part_rows(router, router.parts[0], 0, router.shape[0])
        values = torch.frombuffer(bytearray(rows.data), dtype=torch.float32).view(router.shape)
        assert torch.equal(values, average)


def test_a_run_without_an_average_is_refused(tmp_path: Path) -> None:
    run_distributed(save, 1, tmp_path, None)
    with pytest.raises(CheckpointError, match=r"convert\.ema=true, but checkpoint .* has no EMA of the weights"):
        make_plan(ConvertRoot(convert=ConvertConfig(to="megatron", ema=True)), tmp_path, tmp_path / "target")
