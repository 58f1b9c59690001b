"""The weights of a checkpoint, in any layout of ranks, for model chunks that need no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model
from torch import nn

from moe_train.checkpoint import hf_exchange, origin, state, storage
from moe_train.checkpoint.collective import on_all_ranks, on_main, warn
from moe_train.conversion import hf_config
from moe_train.formats import dcp, dcp_metadata, directory_writer, manifest, run_directory
from moe_train.ranks import RankContext
from parallel.errors import CheckpointError


def load(ranks: RankContext, chunks: Sequence[nn.Module], path: Path, field: str = "init_from") -> Path:
    """Put the weights at `path` into this rank's `chunks`, and return the directory they are in. Every rank calls it.

    Args:
        path: a checkpoint, a run (its newest checkpoint), or a Hugging Face directory.
        field: of the config, which names `path`, for errors.

    Raises:
        CheckpointError: the weights are missing, damaged, or of another model.
    """
    for warning in on_all_ranks(ranks, lambda: origin.check(ranks.cfg.model, path, field), f"read {path}"):
        if ranks.is_main:
            warn(warning)
    if (path / hf_config.FILE).is_file():
        if (path / run_directory.MANIFEST).is_file() and ranks.cfg.checkpoint.verify:
            rank, size = ranks.rank.rank, ranks.layout.world_size
            on_all_ranks(ranks, lambda: directory_writer.verify(path, threads=1, rank=rank, size=size), f"read {path}")
        model = ranks.cfg.model
        loaded = on_all_ranks(ranks, lambda: hf_exchange.read_weights(chunks, model, path), f"read {path}")
    else:
        path = on_main(ranks, lambda: run_directory.resolve(path, field)[0], f"read {path}")
        loaded = read(ranks, state.model_state(chunks), open_checkpoint(ranks, path), path)
    state.load_model(chunks, loaded)
    on_all_ranks(ranks, lambda: refuse_nonfinite(chunks, path, field), f"read {path}")
    return path


def open_checkpoint(ranks: RankContext, path: Path) -> dcp_metadata.Metadata:
    """Table of contents of a checkpoint, after its bytes were compared with its manifest: each rank reads a share.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """

    def look() -> manifest.Files | None:
        run_directory.check_files(path)
        stored, files = run_directory.read_state(path), manifest.read(path)
        if files is None and stored.get("manifest"):
            raise run_directory.damaged(path, f"{run_directory.MANIFEST} is missing")
        if files is None:
            warn(f"checkpoint {path} has no {run_directory.MANIFEST}: its bytes cannot be verified")
        return files

    files = on_main(ranks, look, f"read {path}")
    if files is not None and ranks.cfg.checkpoint.verify:
        rank, size = ranks.rank.rank, ranks.layout.world_size
        on_all_ranks(ranks, lambda: manifest.check(path, files, rank, size), f"read {path}")
    return on_all_ranks(ranks, lambda: dcp_metadata.read(path), f"read {path}")


def read(
    ranks: RankContext, wanted: storage.StateDict, contents: dcp_metadata.Metadata, path: Path
) -> storage.StateDict:
    """The tensors of `wanted` (`state.model_state` and others), read into its own memory.

    Raises:
        CheckpointError: one is missing, has another shape, or cannot be read.
    """
    request = storage.Request(wanted)
    state.find_masters(request, contents, fp32=ranks.cfg.precision.dtype == "fp32")
    on_all_ranks(ranks, lambda: dcp_metadata.check_tensors(contents, request.tensors, path), f"read {path}")
    # torch would unpack any item that a file has in its place.
    on_all_ranks(ranks, lambda: dcp.Checkpoint(path, contents=contents).check_items(request.tensors), f"read {path}")
    try:
        return on_all_ranks(ranks, lambda: request.read(path), f"read {path}")
    except CheckpointError as error:
        raise run_directory.damaged(path, error.cause) from error


def refuse_nonfinite(chunks: Sequence[nn.Module], path: Path, field: str) -> None:
    """Raise CheckpointError where the weights that were read from `field`=`path` make every loss NaN.

    One sum of each weight and router bias. Moments are left out: that of a squared gradient may be infinite.
    """
    for model in unwrap_model(list(chunks)):
        biases = [(name, bias) for name, bias in model.named_buffers() if name.endswith("expert_bias")]
        for name, weight in [*model.named_parameters(), *biases]:
            if not torch.isfinite(weight.detach().sum(dtype=torch.float32)):
                otherwise = _begin_elsewhere(path) if field == "resume" else "start from another checkpoint"
                raise CheckpointError(
                    f"{field}={path}: {name} has NaN or infinite numbers, and every loss would be NaN",
                    f"restore the weights from a copy, or {otherwise}",
                )


def _begin_elsewhere(path: Path) -> str:
    """What the user can do about it. The run does not go back by itself: the same steps would lead there again."""
    step = run_directory.step_of(path.name)
    earlier = [other for other in run_directory.candidates(path.parent) if run_directory.step_of(other.name) < step]
    return f"set resume={earlier[0]}" if earlier else "begin again with resume=never"
