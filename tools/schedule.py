"""`moe-schedule`: what changes over a run: learning rate, batch size, coefficients; as a table and a picture.

    moe-schedule schedule=wsd train.steps=1000
    moe-schedule experiment=deepseek_v3/pretrain plot=schedules.png
    moe-schedule runs/NAME plot=schedules.png   a run, also one under way

The command takes the overrides of `moe-train`; plot and rows are short for view.*. With a run directory the config is
the one with which `moe-train run_dir=` would continue it. Each batch size of a ramp must be whole micro-batches in the
layout, or the command ends with exit code 2 and names sizes that are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_train.checkpoint import continuing
from moe_train.config.composition.compose import compose, hydra_entry
from moe_train.config.composition.validate import validate
from moe_train.config.learning_rate import rate_of
from moe_train.config.quantities import BATCH, CONFIGURED, LR, RunProgress, is_scheduled, schedule_of
from moe_train.config.resolve import decay_end, progress_of
from moe_train.config.roots import ScheduleRoot
from moe_train.config.schema import Config
from moe_train.files import untrusted
from moe_train.formats import run_directory
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from tools import terminal
from tools.words import parse

SHORT = {"plot": "view.plot", "rows": "view.rows"}
_COMMON = ("schedule", "model", "experiment", "train.steps", "train.tokens", "batch.global_batch_size",
          "optimizer.lr", "parallel.dp", "view.plot", "view.rows")  # fmt: skip
_MOST_SIZES = 40
_MOST_POINTS = 2000
"""Measured learning rates in a picture; more cannot be seen."""
_EVENTS = ("lr_reduced", "lr_rewarm", "rolled_back")


@dataclass(frozen=True)
class MeasuredRates:
    """What a run has recorded so far.

    Args:
        step, tokens: of its newest step.
        rates: (tokens before it, learning rate) of its steps.
        events: reactions of the learning rate, and rollbacks.
    """

    step: int
    tokens: int
    rates: list[tuple[int, float]]
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class Curves:
    """The values of a config by the progress of its run."""

    cfg: Config
    progress: RunProgress

    @property
    def quantities(self) -> list[str]:
        """Learning rate, batch size, and what else follows a schedule."""
        return [name for name in CONFIGURED if name in (LR, BATCH) or is_scheduled(self.cfg, name)]

    def value(self, quantity: str, tokens: int) -> float:
        """The value of the step that begins after `tokens`."""
        steps = self.progress
        if quantity == BATCH:
            return steps.batches.size_at(tokens // steps.seq_length)
        if quantity == LR:
            return rate_of(self.cfg, steps, tokens, steps.steps_after(tokens))
        return schedule_of(self.cfg, quantity, steps).value_at(tokens)

    def boundaries(self) -> list[int]:
        """Tokens at which a segment begins, up to the end of the run."""
        found = {0, self.progress.run_tokens}
        for quantity in self.quantities:
            if is_scheduled(self.cfg, quantity):
                found |= {span.begin for span in schedule_of(self.cfg, quantity, self.progress).spans}
            elif quantity == LR:
                schedule = self.cfg.schedule
                ends = (schedule.warmup_steps, decay_end(schedule, self.progress.steps))
                found |= {self.progress.tokens_after(step) for step in ends}
        return sorted(tokens for tokens in found if tokens <= self.progress.run_tokens)


def main() -> None:
    """Console script. Exits with 0, or with 2 where a schedule is wrong or a batch size cannot run."""
    line = parse(sys.argv[1:])
    line.overrides = [_written_out(word) for word in line.overrides]
    work = partial(run, None, [])
    if line.paths:
        of_view = [word for word in line.overrides if word.startswith(("view.", "verbose="))]
        work = partial(run, line.paths[0], [word for word in line.overrides if word not in of_view])
        line.overrides, line.paths = of_view, line.paths[1:]
    sys.exit(
        hydra_entry(work, line.argv(), root=ScheduleRoot, runs=False, answers=True, about=__doc__, common=_COMMON)
    )  # fmt: skip


def _written_out(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{SHORT.get(name, name)}{equals}{value}"


def run(run_dir: str | None, words: Sequence[str], root: ScheduleRoot) -> None:
    """Print the tables, and draw the picture that was asked for.

    Args:
        run_dir: a run, whose config is shown in place of that of the command line; None for none.
        words: overrides for that run.

    Raises:
        ConfigError: the schedules are wrong, there is no such run, or the picture cannot be written.
    """
    cfg, measured = (root, None) if run_dir is None else of_run(run_dir, words)
    layout = validate(cfg)
    curves = Curves(cfg, progress_of(cfg))
    console = terminal.console()
    console.print(headline(curves), soft_wrap=True)
    console.print(table(curves, root.view.rows, measured))
    if is_scheduled(cfg, BATCH):
        console.print(batch_table(curves, layout))
    for line in reactions(cfg, measured):
        console.print(terminal.literal(line), soft_wrap=True)
    if root.view.plot:
        from tools import schedule_plot

        path = Path(root.view.plot)
        try:
            schedule_plot.draw(path, curves, measured)
        except (OSError, ValueError) as error:
            raise ConfigError(f"view.plot={path} cannot be written: {error}", "name a .png file") from error
        console.print(f"wrote {path}", soft_wrap=True)


def of_run(run_dir: str, words: Sequence[str]) -> tuple[Config, MeasuredRates]:
    """The config of a run with the changes of `words`, and what it has recorded.

    Raises:
        ConfigError: the directory has no run.
    """
    if not Path(run_dir, run_directory.CONFIG).is_file():
        raise ConfigError(f"{run_dir} has no {run_directory.CONFIG}", "name the directory of a run")
    overrides = [f"run_dir={run_dir}", *words]
    cfg = continuing.continued(compose(overrides), overrides, compose)
    return cfg, measured_in(Path(run_dir, "metrics.jsonl"), cfg.train.seq_length)


def measured_in(path: Path, seq_length: int) -> MeasuredRates:
    """What a metrics.jsonl says; nothing before the run has written one."""
    rates: list[tuple[int, float]] = []
    events: list[dict[str, Any]] = []
    step = tokens = 0
    for line in untrusted.read_json_lines(path) if path.exists() else ():
        if line.get("event") in _EVENTS:
            events.append(line)
        elif isinstance(line.get("lr"), float) and isinstance(line.get("tokens"), int):
            step, tokens = int(line.get("step", 0)), line["tokens"]
            rates.append((tokens - line.get("global_batch_size", 0) * seq_length, line["lr"]))
    stride = max(1, len(rates) // _MOST_POINTS)
    return MeasuredRates(step, tokens, rates[::stride], events)


def headline(curves: Curves) -> str:
    """Length of the run."""
    steps = curves.progress
    return f"{curves.cfg.model.name}: {steps.run_tokens:,} tokens in {steps.steps:,} steps"


def table(curves: Curves, rows: int, measured: MeasuredRates | None = None) -> Table:
    """Values where a segment begins, and at even distances between."""
    steps = curves.progress
    even = {steps.run_tokens * number // (rows + 1) for number in range(rows + 1)}
    now = {measured.tokens} if measured else set()
    result = Table()
    for name in ("tokens", "step", *curves.quantities, *(["now"] if measured else [])):
        result.add_column(name, justify="right")
    for tokens in sorted({*curves.boundaries(), *even, *now}):
        step = steps.steps_after(tokens)
        begun = min(steps.tokens_after(step), steps.run_tokens)
        values = [_text(name, curves.value(name, begun)) for name in curves.quantities]
        result.add_row(f"{begun:,}", f"{step:,}", *values, *(["<"] if tokens in now else [""] if measured else []))
    return result


def _text(quantity: str, value: float) -> str:
    return f"{value:,.0f}" if quantity == BATCH else f"{value:.6g}"


def batch_table(curves: Curves, layout: ParallelLayout) -> Table:
    """Each batch size of the ramp: where it begins, its steps, its micro-batches on a data-parallel rank."""
    steps, micro = curves.progress, curves.cfg.batch.micro_batch_size
    segments = [s for s in steps.batches.segments if s.first_sample * steps.seq_length < steps.run_tokens]
    ends = [*(segment.first_sample * steps.seq_length for segment in segments[1:]), steps.run_tokens]
    result = Table()
    for name in ("batch size", "from token", "steps", f"micro-batches of {micro} per rank (dp {layout.dp})"):
        result.add_column(name, justify="right")
    for number, (segment, end) in enumerate(zip(segments, ends, strict=True)):
        if _MOST_SIZES // 2 <= number < len(segments) - _MOST_SIZES // 2:
            if number == _MOST_SIZES // 2:
                result.add_row("...", "...", "...", "...")
            continue
        begin = segment.first_sample * steps.seq_length
        count = steps.steps_after(end) - steps.steps_after(begin)
        passes = segment.batch_size // (micro * layout.dp)
        result.add_row(f"{segment.batch_size:,}", f"{begin:,}", f"{count:,}", f"{passes:,}")
    return result


def reactions(cfg: Config, measured: MeasuredRates | None) -> list[str]:
    """What the learning rate reacts to, and has reacted to."""
    schedule, lines = cfg.schedule, []
    if schedule.plateau_patience is not None:
        lines.append(
            f"plateau: times {schedule.plateau_factor:g} after {schedule.plateau_patience + 1} evaluations without a "
            f"better loss, at most {schedule.plateau_max_reductions} times"
        )
    if schedule.rewarm_steps is not None:
        lines.append(
            f"bad step or rollback: times {schedule.rewarm_factor:g} for {schedule.rewarm_cooldown_steps} steps, then "
            f"re-warming over {schedule.rewarm_steps}, at most {schedule.rewarm_max} times"
        )
    for event in measured.events if measured else []:
        facts = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("step", "event"))
        lines.append(f"step {event.get('step')}: {event['event']} {facts}")
    return lines


if __name__ == "__main__":
    main()
