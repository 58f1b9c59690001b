"""What happens once for a job, before any rank trains: checks, device, data, the resolved config on disk."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from moe_train.config.schema import Config
from moe_train.files import atomic
from parallel.errors import ConfigError, LaunchError
from parallel.layout import ParallelLayout


def resolve_runtime(cfg: Config) -> None:
    """Replace `cfg.runtime` = auto by what this machine has."""
    if cfg.runtime == "auto":
        from parallel import runtime

        cfg.runtime = runtime.choose(cfg.runtime)


def prepare_data(cfg: Config) -> None:
    """Make the tokenised dataset where it is not made yet, or check that it is there where it is not ours to make.

    Raises:
        DataError: the text cannot be read, the dataset cannot be written or is damaged, or the vocabulary is too small.
    """
    from moe_train.data import prepare

    progress = cfg.telemetry.progress
    if cfg.data.source == "none":
        prepare.check_prepared(cfg.data, cfg.model.vocab_size)
    elif prepare.prepare(cfg.data, cfg.model.vocab_size, progress=progress) and cfg.data.source == "files":
        for line in prepare.left_out(cfg.data):
            print(line, file=sys.stderr, flush=True)
    for warning in prepare.examine(cfg.data, cfg.model, progress=progress):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def save_config(cfg: Config) -> Path:
    """Write run_dir/config.yaml, whole or not at all, and return its path.

    Raises:
        LaunchError: run_dir cannot be written.
    """
    from moe_train.config.composition import compose

    path = Path(cfg.run_dir) / "config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, compose.to_yaml(cfg))
    except OSError as error:
        remedy = "make space there, or set run_dir=PATH" if error.errno == errno.ENOSPC else "set run_dir=PATH"
        raise LaunchError(f"run_dir={cfg.run_dir} cannot be written: {error.strerror}", remedy) from error
    return path


def visible_gpus() -> int:
    """GPUs that this process could use. Does not initialise CUDA."""
    import torch

    return torch.cuda.device_count()


def check_gpus(layout: ParallelLayout, gpus: int) -> None:
    """Raise ConfigError if `layout` needs more GPUs than the `gpus` that are visible on its only machine."""
    if layout.world_size <= gpus:
        return
    degrees = f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} x dp {layout.dp} = {layout.world_size} ranks"
    raise ConfigError(
        f"runtime=cuda needs one GPU for each rank: parallel.{degrees}, and {gpus} GPUs are visible",
        "lower parallel.tp, pp, cp or dp, start the job on more nodes with srun or torchrun, or set runtime=cpu",
    )
