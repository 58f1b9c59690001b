"""`moe-inspect`: what a checkpoint holds, and where two checkpoints differ, in Hugging Face or Megatron format.

    moe-inspect DIR
    moe-inspect --diff A B [inspect.rows=20] [inspect.weights_only=true]
    moe-inspect --diff A B inspect.norm_rtol=0.03
    moe-inspect --diff A B inspect.atol=1e-6 inspect.rtol=0.01

It takes fields of `inspect`; DIR and A are short for inspect.path=, B for inspect.other=. Exit codes: 0 whole,
equal, or within the tolerances that are given; 1 different; 2 damaged or no checkpoint.
"""

from __future__ import annotations

import os
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from launch import quiet
from moe_train.config.checkpoint_tools import InspectConfig
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.roots import InspectRoot
from parallel.errors import ConfigError
from tools import terminal
from tools.words import parse

if TYPE_CHECKING:
    from moe_train.config.parameter_groups import GroupSummary
    from moe_train.conversion.difference import Comparison, Difference
    from moe_train.conversion.inventory import Inventory
    from moe_train.formats.nonfinite import Tally

_DIFF = "--diff"

_COMMON = (
    "inspect.rows", "inspect.atol", "inspect.rtol", "inspect.norm_rtol", "inspect.weights_only", "inspect.threads",
)  # fmt: skip


def main() -> None:
    """Console script."""
    line = parse(sys.argv[1:], flags=[_DIFF])
    equal: list[bool] = []
    compared = _DIFF in line.flags
    argv = line.argv("inspect.path", "inspect.other")
    code = hydra_entry(
        lambda cfg: equal.append(run(cfg, compared)),
        argv=argv,
        root=InspectRoot,
        runs=False,
        about=__doc__,
        common=_COMMON,
        flags=[_DIFF],
    )
    sys.exit(code or int(not all(equal)))


def run(cfg: InspectRoot, compared: bool) -> bool:
    """Describe a checkpoint, or compare two where `compared` or a second one is named. Returns whether they are equal.

    Raises:
        ConfigError, CheckpointError: a path is not a checkpoint, or the checkpoint is damaged.
    """
    path, other = cfg.inspect.path, cfg.inspect.other
    if path is None:
        raise ConfigError(
            "inspect.path is missing: the checkpoint to describe", "use moe-inspect DIR or moe-inspect --diff A B"
        )
    if compared and other is None:
        raise ConfigError("inspect.other is missing: the second checkpoint", "use moe-inspect --diff A B")
    quiet.silence()
    import torch

    from moe_train.conversion import inventory

    torch.set_num_threads(1)  # files and tensors are read concurrently
    threads = cfg.inspect.threads or len(os.sched_getaffinity(0))
    first = inventory.find(Path(path), "inspect.path")
    if other is None:
        _describe(inventory.take(first), threads)
        return True
    return _compare(first, inventory.find(Path(other), "inspect.other"), threads, cfg.inspect)


def _describe(checkpoint: Inventory, threads: int) -> None:
    from moe_train.conversion.inventory import MASTERS, MOMENTS, sizes
    from moe_train.formats.nonfinite import Tally

    files, size = sizes(checkpoint.path)
    facts = {"checkpoint": str(checkpoint.path), "format": checkpoint.format, "model": checkpoint.name}
    facts["family"] = checkpoint.model.family if checkpoint.model else "not one that can be converted"
    facts |= checkpoint.facts
    facts["files"] = f"{files:,}, {size:,} bytes"
    if moments := checkpoint.elements[MOMENTS]:
        masters = checkpoint.elements[MASTERS]
        facts["optimizer"] = f"{moments:,} moments, " + (f"{masters:,} fp32 weights" if masters else "no fp32 weights")
    else:
        facts["optimizer"] = "none"
    table = Table(show_header=False, box=None)
    for name, text in facts.items():
        table.add_row(name, terminal.literal(text))
    console = terminal.console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(_parts(checkpoint))
    console.print(_dtypes(checkpoint))
    if checkpoint.groups:
        console.print(_groups(checkpoint.groups))
    tally = Tally()
    console.print(f"integrity: {_integrity(checkpoint, threads, tally)}", markup=False)
    tally.refuse("not all numbers are finite", "convert them with convert.allow_nonfinite=true")


def _parts(checkpoint: Inventory) -> Table:
    """Parameters that are there in addition to those of the arithmetic."""
    from moe_train.conversion.inventory import BIAS, NOT_PARAMETERS

    expected = checkpoint.expected()
    wanted = expected.by_part(include_mtp=True) if expected else {}
    rows: list[tuple[str, int, int | None]] = [
        (part.replace("_", " "), count, wanted.get(part, 0) if expected else None)
        for part, count in checkpoint.parameters.items()
        if count or wanted.get(part)
    ]
    total, mtp = sum(checkpoint.parameters.values()), checkpoint.parameters["mtp"]
    rows.append(("total", total, expected.total_with_mtp if expected else None))
    if mtp or (expected and expected.mtp):
        rows.append(("total without mtp", total - mtp, expected.total if expected else None))
    if expected:
        rows.append(("active, without mtp", checkpoint.active, expected.active))
    for part in NOT_PARAMETERS:
        biases = expected.expert_bias + expected.mtp_expert_bias if expected else 0
        if checkpoint.elements[part] or (part == BIAS and biases):
            rows.append(
                (part.replace("_", " "), checkpoint.elements[part], biases if expected and part == BIAS else None)
            )
    table = Table("part", "in the checkpoint", "by arithmetic", "note", title="parameters", title_justify="left")
    for column in table.columns[1:3]:
        column.justify = "right"
    for part, count, by_arithmetic in rows:
        differs = by_arithmetic is not None and by_arithmetic != count
        shown = "" if by_arithmetic is None else f"{by_arithmetic:,}"
        table.add_row(part, f"{count:,}", shown, f"differs by {count - by_arithmetic:+,}" if differs else "")  # type: ignore[operator]
    return table


def _dtypes(checkpoint: Inventory) -> Table:
    table = Table("dtype", "tensors", "bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    for dtype, (tensors, size) in sorted(checkpoint.dtypes.items()):
        table.add_row(dtype, f"{tensors:,}", f"{size:,}")
    return table


def _groups(groups: list[GroupSummary]) -> Table:
    """What the optimizer does with which parameters."""
    table = Table(
        "match", "optimizer", "lr multiplier", "weight decay", "tensors", "parameters",
        title="parameter groups", title_justify="left",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for g in groups:
        name = terminal.literal(g.match or "all others")
        table.add_row(
            name, g.optimizer, f"{g.lr_multiplier:g}", f"{g.weight_decay:g}", f"{g.tensors:,}", f"{g.parameters:,}"
        )
    return table


def _integrity(checkpoint: Inventory, threads: int, tally: Tally) -> str:
    """Raises CheckpointError, which names the file, where one is damaged."""
    from moe_train.conversion import inventory
    from moe_train.formats import directory_writer

    if not inventory.has_manifest(checkpoint.path):
        return "every tensor of the table of contents is in a file that is long enough (no manifest: bytes unverified)"
    total = sum(entry["bytes"] for entry in directory_writer.manifest_of(checkpoint.path).values())
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=total)
        files, size, counts = inventory.verify(checkpoint.path, threads, lambda done: progress.advance(task, done))
    tally.merge(counts.found)
    return f"{files:,} files, {size:,} bytes, as their manifest says (SHA-256)"


def _compare(first: Path, second: Path, threads: int, options: InspectConfig) -> bool:
    from moe_train.conversion import difference

    tolerances = difference.Tolerances(options.atol, options.rtol, options.norm_rtol)
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing tensors", total=None)
        comparison = difference.compare(
            first, second, threads, lambda done, of: progress.update(task, completed=done, total=of), tolerances,
            options.weights_only,
        )  # fmt: skip
    console = terminal.console(highlight=False, soft_wrap=True)
    console.print(f"A {first}\nB {second}", markup=False)
    if comparison.mapped:
        console.print("compared as Hugging Face tensors, one for each expert")
    for name, (a, b) in comparison.settings.items():
        console.print(terminal.literal(f"model.{name} is {a} in A and {b} in B"))
    rows = options.rows
    if comparison.differences and rows:
        console.print(_rows(comparison.differences[:rows], tolerances.given))
    if len(comparison.differences) > rows:
        console.print(f"and {len(comparison.differences) - rows:,} more")
    console.print(_totals(comparison, tolerances.given), markup=False)
    return comparison.passes


def _rows(differences: list[Difference], tolerances: bool) -> Table:
    verdict = ["passes"] if tolerances else []
    table = Table("tensor", "what", "A", "B", "numbers", "absolute", "relative", "norm", *verdict)
    for column in table.columns[4:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for d in differences:
        of_values = (
            [f"{d.numbers:,}", f"{d.absolute:.3g}", f"{d.relative:.3g}", f"{d.norm:.3g}"]
            if d.what in ("values", "dtype")
            else [""] * 4
        )
        passes = ["yes" if d.within else "no"] if tolerances else []
        texts = (terminal.literal(text or "-") for text in d.texts)
        table.add_row(terminal.literal(d.name), d.what, *texts, *of_values, *passes)
    return table


def _totals(comparison: Comparison, tolerances: bool) -> str:
    kinds = [d.what for d in comparison.differences]
    counts = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
    equal = comparison.tensors - len(kinds)
    if not kinds:
        return f"all {comparison.tensors:,} tensors are equal, bit by bit"
    measured = [d for d in comparison.differences if isfinite(d.absolute)]
    worst = max((d.absolute for d in measured), default=0.0), max((d.relative for d in measured), default=0.0)
    norm = max((d.norm for d in measured), default=0.0)
    largest = ""
    if measured:
        largest = f"; largest difference {worst[0]:.3g} absolute, {worst[1]:.3g} relative, {norm:.3g} of a norm"
    beyond = sum(not d.within for d in comparison.differences)
    verdict = f"; beyond the tolerances: {beyond:,}" if tolerances else ""
    return f"{equal:,} of {comparison.tensors:,} tensors are equal; differing: {counts}{largest}{verdict}"


if __name__ == "__main__":
    main()
