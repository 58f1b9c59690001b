"""`moe-convert`: checkpoints from Hugging Face to Megatron and back, in other precisions and file sizes.

    moe-convert SOURCE TARGET [convert.dtype=bf16] [convert.to=hf|megatron] [model=NAME]
    moe-convert verify DIR
    mpirun -n 4 moe-convert SOURCE TARGET

It takes the overrides of `moe-train`; SOURCE and TARGET are short for convert.source= and convert.target=.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from launch import quiet
from moe_train.config.compose import hydra_entry
from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config
from moe_train.config.walk import get
from parallel.errors import CheckpointError, ConfigError, MoeTrainError

if TYPE_CHECKING:
    from moe_train.checkpoint.hf.workers import Team
    from moe_train.checkpoint.hf.writer import Plan

_VERIFY = "verify"


def main() -> None:
    """Console script. Of several MPI ranks only the first speaks, and all end with its exit code."""
    from moe_train.checkpoint.hf import workers

    words = sys.argv[1:]
    try:
        team = workers.from_environment()
    except MoeTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    with contextlib.ExitStack() as stack:
        if team.rank:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        sys.exit(hydra_entry(partial(run, words=words, team=team), argv=_overrides(words)))


def _overrides(words: Sequence[str]) -> list[str]:
    """The command line with SOURCE and TARGET, or DIR after `verify`, as overrides."""
    paths = [w for w in words if not w.startswith(("-", "~", "+")) and "=" not in w]
    others = [w for w in words if w not in paths]
    named = paths[1:] if paths[:1] == [_VERIFY] else paths
    fields = ("convert.source", "convert.target")
    given = [f"{field}='{path}'" for field, path in zip(fields, named, strict=False)]
    return [*given, *others, *named[2:]]  # a third path is no override, and Hydra says so


def run(cfg: Config, words: Sequence[str], team: Team) -> None:
    """Convert or verify.

    Raises:
        ConfigError, CheckpointError: with a cause and a remedy; nothing was written, or only what a rerun continues.
    """
    quiet.silence()
    import torch

    from moe_train.checkpoint.hf import writer

    torch.set_num_threads(1)  # files are written side by side
    threads = cfg.convert.threads or max(1, (os.cpu_count() or 1) // team.size)
    source = _source(cfg)
    if _VERIFY in words:
        if team.rank == 0:
            total = sum(entry["bytes"] for entry in writer.manifest_of(source).values())
            with _bar("verifying", total, team) as advance:
                files, size = writer.verify(source, threads, advance)
            _say(f"{source}: {files} files, {size / 1e9:,.2f} GB, as they were written")
        return
    if cfg.convert.target is None:
        raise ConfigError("convert.target=null names no directory to write", "use moe-convert SOURCE TARGET")
    plan = make_plan(cfg, source, Path(cfg.convert.target), words)
    share = sum(job.bytes for job in plan.jobs[team.rank :: team.size])
    with _bar("converting", share, team) as advance:
        outcome = writer.run(plan, team, threads, advance)
    if team.rank == 0:
        kept = f", {outcome.reused} of them from an earlier try" if outcome.reused else ""
        _say(f"{plan.target}: {outcome.files} files{kept}, {outcome.bytes / 1e9:,.2f} GB")


def _source(cfg: Config) -> Path:
    if cfg.convert.source is None:
        raise ConfigError("convert.source=null names no checkpoint", "use moe-convert SOURCE TARGET")
    path = Path(cfg.convert.source)
    if not path.is_dir():
        raise CheckpointError(f"convert.source={path} is not a directory", "name a checkpoint that exists")
    return path


def make_plan(cfg: Config, source: Path, target: Path, words: Sequence[str] = ()) -> Plan:
    """What to write. The target's format is the other one unless the config says so.

    Raises:
        ConfigError, CheckpointError: the source cannot be read, or the target cannot hold it.
    """
    from moe_train.checkpoint.hf import config, convert, mapping, writer

    options = convert.Options(
        cfg.convert.dtype,
        None if cfg.convert.file_gb is None else int(cfg.convert.file_gb * 1e9),
        cfg.convert.optimizer,
        cfg.convert.power_of_two_scales,
    )
    if (source / writer.MANIFEST).is_file():
        writer.verify(source, cfg.convert.threads or os.cpu_count() or 1)  # a flipped byte must not travel on
    if (source / config.FILE).is_file():
        tensors = convert.HuggingFace(source)
        model = _chosen(cfg, words, lambda: config.to_model(tensors.config, source / config.FILE))
        mapped = convert.MappedSource(tensors, model)
        if cfg.convert.to in (None, "megatron"):
            return convert.to_megatron(mapped, target, cfg, options)
        reader: Any = convert.HuggingFaceReader(mapped)
        extents = list(tensors.extents.values())
        kept = convert.small_files(source)
        return convert.to_hf(reader, mapped.pieces, model, target, options, source, extents, tensors.config, kept)
    return _plan_of_megatron(cfg, source, target, words, options, mapping.pieces)


def _plan_of_megatron(
    cfg: Config, source: Path, target: Path, words: Sequence[str], options: Any, pieces: Callable[..., Any]
) -> Plan:
    from moe_train.checkpoint import compat, directory
    from moe_train.checkpoint.hf import config, convert, distcp

    path = directory.resolve(source, "convert.source")[0]
    directory.check_files(path)
    checkpoint = distcp.Checkpoint(path)
    if cfg.convert.to == "megatron":
        return convert.copy_megatron(checkpoint, target, options)
    model = _chosen(cfg, words, lambda: compat.model_of(path))
    all_pieces = pieces(model)
    reader = convert.MegatronReader(checkpoint, all_pieces, fp32=options.dtype == "fp32")
    extents = [chunk.extent for piece in all_pieces for chunk in checkpoint.chunks(piece.key)]
    kept = path / convert.KEPT
    original = json.loads((kept / config.FILE).read_text()) if (kept / config.FILE).is_file() else None
    small = convert.small_files(kept)
    return convert.to_hf(reader, all_pieces, model, target, options, path, extents, original, small)


def _chosen(cfg: Config, words: Sequence[str], described: Callable[[], ModelConfig]) -> ModelConfig:
    """The model that the checkpoint describes, with what the command line says of it."""
    if any(word.startswith("model=") for word in words):
        return cfg.model
    names = [word.partition("=")[0].lstrip("+") for word in words if word.lstrip("+").startswith("model.")]
    return replace(described(), **{name.removeprefix("model."): get(cfg, name) for name in names})


@contextlib.contextmanager
def _bar(what: str, total: int, team: Team) -> Iterator[Callable[[int], None]]:
    """A progress bar of this rank's bytes, on the first rank's terminal."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=team.rank > 0) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


def _say(line: str) -> None:
    Console(soft_wrap=True, highlight=False).print(line, markup=False)


if __name__ == "__main__":
    main()
