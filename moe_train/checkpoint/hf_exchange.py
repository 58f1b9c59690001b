"""Hugging Face weights into a run, and a run's checkpoint into Hugging Face format, in any layout of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from moe_train.checkpoint import continuing, state, storage
from moe_train.checkpoint.collective import on_main
from moe_train.config.model import ModelConfig
from moe_train.conversion import plans, small_files
from moe_train.conversion.hf_source import HuggingFace, MappedSource
from moe_train.conversion.mapping import Piece, pieces
from moe_train.formats import dcp, run_directory
from moe_train.formats.communicator import TorchCommunicator
from moe_train.formats.directory_writer import WritePlan, together
from moe_train.formats.directory_writer import run as write
from moe_train.formats.dtypes import of_torch
from moe_train.run import Run


@torch.no_grad()
def read_weights(chunks: Sequence[nn.Module], model: ModelConfig, path: Path) -> storage.StateDict:
    """This rank's shards of the weights in the Hugging Face directory `path`, for `state.load_model`.

    Args:
        chunks: of this rank, as `model` describes them.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is in a damaged file.
    """
    source = HuggingFace(path)
    mapped = MappedSource(source, model)
    by_place = {(piece.key, piece.index): piece for piece in mapped.pieces}
    stacked = {piece.key for piece in mapped.pieces if piece.index is not None}
    request = storage.Request(state.model_state(chunks))
    return request.fill(lambda shard: _shard(shard, mapped, by_place, shard.key in stacked))


def _shard(
    shard: ShardedTensor, source: MappedSource, by_place: dict[tuple[str, int | None], Piece], stacked: bool
) -> Tensor:
    """The rank's part of one tensor, read piece by piece into its own memory."""
    data: Tensor = shard.data.detach()
    lead = shard.prepend_axis_num  # axes of the global tensor that the local one does not have
    sizes = (1,) * lead + tuple(data.shape)
    box = list(zip(shard.global_offset, sizes, strict=True))
    view = data.view(sizes)
    for number in range(box[0][1] if stacked else 1):
        piece = by_place[shard.key, box[0][0] + number if stacked else None]
        (start, rows), *others = box[1:] if stacked else box
        whole = source.read(piece, start, start + rows, of_torch(data.dtype)).tensor()
        for axis, (offset, size) in enumerate(others, 1):
            whole = whole.narrow(axis, offset, size)
        (view[number] if stacked else view).copy_(whole)
    return data


def export_last(run: Run) -> None:
    """With `export_hf`, export the checkpoint of the current step, the last, unless that was done. Every rank calls it.

    Raises:
        CheckpointError: it cannot be written, or there is no checkpoint of this step.
    """
    if not run.cfg.export_hf:
        return
    path = run.cfg.checkpoint_root / run_directory.name_of(run.state.step)
    if on_main(run, lambda: continuing.is_exported(run.cfg, path), f"read {continuing.export_of(run.cfg, path)}"):
        return
    exported = export(run, path)
    if run.is_main:
        print(f"Hugging Face weights in {exported}", flush=True)


def export(run: Run, checkpoint: Path) -> Path:
    """Write the weights of the run's `checkpoint` to run_dir/hf/step_N, all ranks together. Returns the directory.

    Raises:
        CheckpointError: it cannot be written.
    """
    target = continuing.export_of(run.cfg, checkpoint)
    comm = TorchCommunicator()
    together(comm, lambda: _remove(target) if run.is_main else None)
    plan = together(comm, lambda: _export_plan(run, checkpoint, target))
    write(plan, comm, threads=max(1, torch.get_num_threads()))
    return target


def _remove(target: Path) -> None:
    """What an earlier run with this run_dir exported."""
    if target.exists():
        shutil.rmtree(target)


def _export_plan(run: Run, checkpoint: Path, target: Path) -> WritePlan:
    stored = dcp.Checkpoint(checkpoint)
    all_pieces = pieces(run.cfg.model)
    reader = plans.MegatronReader(stored, all_pieces)
    small = small_files.of_run(run.cfg.model, run.cfg.data, run.run_dir)
    return plans.to_hf(
        reader, all_pieces, run.cfg.model, target, plans.ConvertOptions(), checkpoint, stored.files, small
    )  # fmt: skip
