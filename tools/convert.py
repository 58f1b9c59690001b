"""`moe-convert`: convert checkpoints from Hugging Face to Megatron and back, in other precisions and file sizes.

    moe-convert SOURCE TARGET [convert.dtype=bf16] [convert.to=hf|megatron]
    moe-convert runs/mine mine-hf                   the newest checkpoint
    moe-convert runs/mine mine-int4 convert.dtype=int4
    moe-convert verify DIR                          compare with its checksums
    moe-convert verify SOURCE DIR                   an export with its source
    mpirun -n 4 moe-convert SOURCE TARGET           several processes

It takes fields of `convert` and `model`; SOURCE and TARGET are short for convert.source= and convert.target=.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch import quiet
from moe_train.config.assumed import names_of
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.model import ModelConfig
from moe_train.config.roots import ConvertRoot
from moe_train.config.rules import model as model_rules
from moe_train.config.schema import DataConfig
from moe_train.config.walk import get
from parallel.errors import CheckpointError, ConfigError, MoeTrainError
from parallel.suggest import Impossible
from tools.words import CommandLine, parse

if TYPE_CHECKING:
    from moe_train.conversion.hf_outputs import ConvertOptions, Reader
    from moe_train.conversion.hf_source import MappedSource
    from moe_train.conversion.mapping import Piece
    from moe_train.conversion.small_files import SmallFiles
    from moe_train.formats import dcp
    from moe_train.formats.communicator import Communicator
    from moe_train.formats.directory_writer import WritePlan

_VERIFY = "verify"
_SHOWN = 20
"""Differences that `verify` prints."""

_COMMON = (
    "model", "convert.to", "convert.dtype", "convert.group_size", "convert.keep", "convert.file_gb",
    "convert.optimizer", "convert.threads",
)  # fmt: skip


def main() -> None:
    """Console script. Of several MPI ranks only the first prints, and all end with its exit code."""
    from moe_train.formats import communicator

    words = sys.argv[1:]
    try:
        comm = communicator.from_environment()
    except MoeTrainError as error:
        if communicator.is_reporting_rank():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    with contextlib.ExitStack() as stack:
        if comm.rank:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        line = parse(words, [_VERIFY])
        argv = line.argv("convert.source", "convert.target")
        work = partial(run, line=line, comm=comm)
        sys.exit(hydra_entry(work, argv=argv, root=ConvertRoot, runs=False, about=__doc__, common=_COMMON))


def run(cfg: ConvertRoot, line: CommandLine, comm: Communicator) -> None:
    """Convert or verify.

    Raises:
        ConfigError, CheckpointError: with a cause and a remedy; nothing was written, or only what a rerun continues.
    """
    quiet.silence()
    from moe_train.formats import communicator, directory_writer

    os.environ["OMP_NUM_THREADS"] = "1"  # for torch where numbers change: files are written concurrently
    threads = cfg.convert.threads or 2 * communicator.cores(comm) + 2  # some wait for the disk while others compute
    source = directory_writer.together(comm, lambda: _source(cfg))
    if line.command == _VERIFY and cfg.convert.target is not None:
        _verify_export(cfg, source, Path(cfg.convert.target), line.overrides, threads, comm)
        return
    if line.command == _VERIFY:
        _verify(directory_writer.together(comm, lambda: _written(source)), threads, comm, cfg.convert.allow_nonfinite)
        return
    if cfg.convert.target is None:
        raise ConfigError("convert.target is missing: the directory to write", "use moe-convert SOURCE TARGET")
    target = Path(cfg.convert.target)
    plan = directory_writer.together(comm, lambda: make_plan(cfg, source, target, line.overrides, comm, threads))
    share = sum(job.bytes for job in plan.jobs[comm.rank :: comm.size])
    with _bar("converting", share, comm) as advance:
        outcome = directory_writer.run(plan, comm, threads, advance)
    notes = [note for notes in comm.all_gather(plan.notes) for note in notes]
    if comm.rank == 0:
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        reused = f", {outcome.reused} of them from an earlier try" if outcome.reused else ""
        print(f"{plan.target}: {outcome.files} files{reused}, {outcome.bytes / 1e9:,.2f} GB")
        for remark in plan.remarks:
            print(f"note: {remark}")


def _verify(source: Path, threads: int, comm: Communicator, allow_nonfinite: bool) -> None:
    from moe_train.conversion import inventory, plans
    from moe_train.formats import directory_writer, nonfinite

    def check() -> tuple[int, int, nonfinite.Tally]:
        total = sum(entry["bytes"] for entry in directory_writer.manifest_of(source).values())
        with _bar("verifying", total // comm.size, comm) as advance:
            return inventory.verify(source, threads, advance, comm.rank, comm.size)

    checked = comm.all_gather(directory_writer.together(comm, check))
    nonfinite_values = nonfinite.Tally()
    for _, _, tally in checked:
        nonfinite_values.merge(tally.found)
    if not allow_nonfinite:
        nonfinite_values.refuse(
            f"{source}: the bytes are those that were written, and not all numbers are finite", plans.ALLOW
        )
    if comm.rank == 0:
        if nonfinite_values.found:
            print(f"warning: {nonfinite_values}", file=sys.stderr)
        files, size = (sum(part[i] for part in checked) for i in (0, 1))
        print(f"{source}: {files} files, {size / 1e9:,.2f} GB, every byte as written")


def _verify_export(
    cfg: ConvertRoot, source: Path, target: Path, words: Sequence[str], threads: int, comm: Communicator
) -> None:
    """Compare an export with what `source` exports to; prints what differs."""
    from moe_train.conversion import verification
    from moe_train.conversion.hf_outputs import Export, group_bytes
    from moe_train.formats import directory_writer

    def check() -> tuple[verification.Discrepancies, list[verification.Discrepancy], str]:
        verification.refuse_other_formats(source, target)
        opened = _export_source(cfg, source, words, comm, threads)
        given = _options(cfg)
        options = verification.options_of(target, given, opened.pieces, opened.reader(given))
        reader = opened.reader(options)
        export = Export(reader, opened.pieces, options)
        settings = verification.config_findings(export, opened.model, opened.small, target) if comm.rank == 0 else []
        total = sum(group_bytes(group) for group in export.groups[comm.rank :: comm.size])
        with _bar("comparing", total, comm) as advance:
            found = verification.compare(export, reader, target, threads, advance, comm.rank, comm.size)
        tensors = sum(len(group) for group in export.groups)
        return found, settings, f"{tensors:,} tensors in {export.format.text if export.format else 'plain numbers'}"

    found, settings, text = directory_writer.together(comm, check)
    shares = comm.all_gather(found)
    merged = verification.Discrepancies()
    for share in shares:
        merged.merge(share)
    findings = [*comm.broadcast(settings), *merged.listed()]
    if comm.rank == 0:
        for finding in findings[:_SHOWN]:
            print(finding)
        if len(findings) > _SHOWN:
            print(f"and {len(findings) - _SHOWN:,} more")
    verification.refuse(findings, source, target)
    if comm.rank == 0:
        print(f"{target}: {text}, as {source} exports to")


def _source(cfg: ConvertRoot) -> Path:
    if cfg.convert.source is None:
        raise ConfigError(
            "convert.source is missing: the checkpoint to read",
            "use moe-convert SOURCE TARGET, or moe-convert verify DIR",
        )
    path = Path(cfg.convert.source)
    if not path.is_dir():
        raise CheckpointError(f"convert.source={path} is not a directory", "name a checkpoint that exists")
    return path


def _written(path: Path) -> Path:
    """What `path` means: a directory with a manifest itself, or the newest checkpoint of a run."""
    from moe_train.formats import run_directory

    if (path / run_directory.MANIFEST).is_file():
        return path
    checkpoints = run_directory.candidates(path) or run_directory.candidates(path / "checkpoints")
    return checkpoints[0] if checkpoints else path


def make_plan(
    cfg: ConvertRoot,
    source: Path,
    target: Path,
    words: Sequence[str] = (),
    comm: Communicator | None = None,
    threads: int = 1,
) -> WritePlan:
    """What to write. The target's format is the other one unless the config says so.

    A Hugging Face source with a manifest is compared with it first, by each process of `comm` a share. Items of a
    Megatron source have checksums, with which they are compared while they are read.

    Raises:
        ConfigError, CheckpointError: the source cannot be read, or the target cannot hold it.
    """
    from moe_train.conversion import hf_config as config
    from moe_train.conversion import plans
    from moe_train.formats import directory_writer

    directory_writer.refuse_existing(target)  # before anything large is read
    options = _options(cfg)
    if (source / config.FILE).is_file():
        if cfg.convert.to in (None, "megatron"):
            mapped = _open_hugging_face(cfg, source, words, comm, threads)
            return plans.to_megatron(mapped, target, options)
    elif cfg.convert.to == "megatron":
        return plans.copy_megatron(_open_megatron(source), target, options)
    return _export_source(cfg, source, words, comm, threads).plan(target, options)


def _options(cfg: ConvertRoot) -> ConvertOptions:
    from moe_train.conversion.hf_outputs import ConvertOptions

    return ConvertOptions(
        cfg.convert.dtype,
        None if cfg.convert.file_gb is None else int(cfg.convert.file_gb * 1e9),
        cfg.convert.optimizer,
        cfg.convert.power_of_two_scales,
        cfg.convert.allow_nonfinite,
        cfg.convert.group_size,
        tuple(cfg.convert.keep),
        cfg.convert.ema,
    )


def _open_hugging_face(
    cfg: ConvertRoot, source: Path, words: Sequence[str], comm: Communicator | None, threads: int
) -> MappedSource:
    from moe_train.conversion import hf_config as config
    from moe_train.conversion.hf_source import HuggingFace, MappedSource
    from moe_train.formats import directory_writer

    if cfg.convert.ema:
        raise ConfigError(
            f"convert.ema=true, but convert.source={source} is in Hugging Face format, which has no EMA",
            "leave convert.ema out, or name a run",
        )
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    if (source / directory_writer.MANIFEST).is_file():  # a flipped byte must not be copied
        directory_writer.verify(source, threads, rank=rank, size=size)
    tensors = HuggingFace(source)
    model = _chosen(cfg, words, lambda: config.to_model(tensors.config, source / config.FILE))
    return MappedSource(tensors, model)


@dataclass(frozen=True)
class _ExportSource:
    """A checkpoint that is exported to Hugging Face format."""

    directory: Path
    model: ModelConfig
    pieces: Sequence[Piece]
    files: Collection[Path]
    """Those that hold its tensors."""
    small: SmallFiles
    reader: Callable[[ConvertOptions], Reader]

    def plan(self, target: Path, options: ConvertOptions) -> WritePlan:
        """What the export writes."""
        from moe_train.conversion import plans

        reader = self.reader(options)
        return plans.to_hf(reader, self.pieces, self.model, target, options, self.directory, self.files, self.small)


def _export_source(
    cfg: ConvertRoot, source: Path, words: Sequence[str], comm: Communicator | None, threads: int
) -> _ExportSource:
    from moe_train.conversion import hf_config as config
    from moe_train.conversion import mapping, plans, small_files
    from moe_train.formats import run_config, run_directory

    if (source / config.FILE).is_file():
        mapped = _open_hugging_face(cfg, source, words, comm, threads)
        files = sorted({extent.path for extent in mapped.source.extents.values()})
        small = small_files.of_directory(source)
        reader = plans.HuggingFaceReader(mapped)
        return _ExportSource(source, mapped.model, mapped.pieces, files, small, lambda _: reader)
    checkpoint = _open_megatron(source)
    path = checkpoint.directory
    model = _chosen(cfg, words, lambda: run_config.model_of(path))
    mapping.refuse_larger(model, checkpoint.numbers, path / run_directory.CONFIG)
    all_pieces = mapping.pieces(model)
    small = _small_files(cfg, path, model)
    return _ExportSource(
        path, model, all_pieces, checkpoint.files, small,
        lambda options: plans.MegatronReader(checkpoint, all_pieces, options.dtype == "fp32", options.ema),
    )  # fmt: skip


def _open_megatron(source: Path) -> dcp.Checkpoint:
    from moe_train.formats import dcp, directory_writer, run_directory

    path = run_directory.resolve(source, "convert.source")[0]
    run_directory.check_files(path)
    run_directory.read_state(path)  # names of tensors differ between formats
    checkpoint = dcp.Checkpoint(path, dcp.Checks())
    if (path / directory_writer.MANIFEST).is_file():
        directory_writer.verify(path, 1, leave_out={file.name for file in checkpoint.files})
    return checkpoint


def _small_files(cfg: ConvertRoot, path: Path, model: ModelConfig) -> SmallFiles:
    """Those that a conversion to Megatron kept, else those of the run, whose data can be in convert.data_dir now."""
    from moe_train.conversion import hf_config as config
    from moe_train.conversion import small_files
    from moe_train.formats import run_config

    if (path / small_files.KEPT / config.FILE).is_file():
        return small_files.of_directory(path / small_files.KEPT)
    saved = run_config.read(path)
    written = saved.get("data") if isinstance(saved.get("data"), dict) else {}
    known = {field.name for field in fields(DataConfig)}
    data = DataConfig(**{name: value for name, value in (written or {}).items() if name in known})
    if cfg.convert.data_dir is not None:
        data = replace(data, dir=cfg.convert.data_dir)
    first = saved.get("init_from")
    places = [path, *(Path(place) for place in (saved.get("run_dir"), first) if isinstance(place, str) and place)]
    weights = next((place for place in places if small_files.origin_of(place)), None)
    if weights is None and isinstance(first, str) and not Path(first).exists():
        print(f"warning: init_from={first} is gone: the files that came with its weights are missing", file=sys.stderr)
    return small_files.of_run(model, data, weights)


def _chosen(cfg: ConvertRoot, words: Sequence[str], described: Callable[[], ModelConfig]) -> ModelConfig:
    """The model that the checkpoint describes, with what the command line says of it.

    Raises:
        ConfigError: no model can be like that.
    """
    chosen = "model" in names_of(words)
    changes = [word for word in words if word.lstrip("+").startswith("model.")]
    names = [word.partition("=")[0].lstrip("+") for word in changes]
    model = (
        cfg.model if chosen else replace(described(), **{name.removeprefix("model."): get(cfg, name) for name in names})
    )
    try:
        model_rules.check(model)
    except Impossible as problem:
        whose = f"model={model.name}" if chosen else f"the model of {cfg.convert.source}"
        remedy = problem.remedy
        if changes:
            whose += f" with {' '.join(changes)}"
            remedy = f"leave {' '.join(names)} out, or {remedy}"
        raise ConfigError(f"{whose}: {problem.cause}", remedy) from problem
    return model


@contextlib.contextmanager
def _bar(description: str, total: int, comm: Communicator) -> Iterator[Callable[[int], None]]:
    """A progress bar of this rank's bytes, on the first rank's terminal."""
    if comm.rank > 0 or not sys.stderr.isatty():  # elsewhere it would leave an empty line
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda size: progress.advance(task, size)


if __name__ == "__main__":
    main()
