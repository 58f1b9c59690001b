"""`moe-plan`: what a run needs before it is rented: layout, memory, step time, days, dollars, energy.

    moe-plan model=deepseek_v3 cluster=h800 gpus=2048 tokens=14.8T
    moe-plan model=NAME cluster=NAME gpus=N top=20 output=DIR write=FILE
    moe-plan model=NAME cluster=NAME parallel=NAME search=false   one layout
    moe-plan validate [runs=FILE.csv] [models=DIR] [results=FILE.json]

`validate` compares with published runs, by default with those of tools/published/published_runs.csv. The command takes
the overrides of `moe-train`, plan.*, and engine.* for the KV cache of the best layout. gpus, top, output, write,
search, runs, models and results are short for plan.*, tokens for train.tokens. Where the command line says nothing
else, it looks at GPUs with Transformer Engine (runtime=cuda), BF16, and without an experiment at sequences of 4,096
tokens in DeepSeek-V3's batch (train.seq_length=4096 batch=large).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.composition.compose import hydra_entry
from moe_train.config.composition.validate import validate
from moe_train.config.roots import PlanRoot
from parallel.errors import ConfigError, MoeTrainError
from tools import terminal
from tools.memory import assume
from tools.planning.recipe import count
from tools.words import parse

if TYPE_CHECKING:
    from tools.planning.answer import Answer

SHORT = {
    "gpus": "plan.gpus", "top": "plan.top", "output": "plan.output", "write": "plan.write", "runs": "plan.runs",
    "models": "plan.models", "results": "plan.results", "tokens": "train.tokens", "search": "plan.search",
}  # fmt: skip
COUNTED = ("plan.gpus", "train.tokens")

_COMMON = ("model", "cluster", "precision", "experiment", "plan.gpus", "train.tokens", "train.seq_length",
          "batch.global_batch_size", "plan.search", "plan.top", "plan.output", "plan.write")  # fmt: skip


def main() -> None:
    """Console script. Exits with 0, or with 2 where the configuration is wrong or nothing fits."""
    line = parse(sys.argv[1:], ["validate"])
    try:
        overrides = translated(line.argv())
    except MoeTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    work = run_validation if line.command else run
    sys.exit(hydra_entry(work, overrides, root=PlanRoot, trains=False, runs=False, about=__doc__, common=_COMMON))


def translated(words: Sequence[str]) -> list[str]:
    """The command line with short names written out, numbers such as 14.8T too, and what is assumed where it is silent.

    Raises:
        ConfigError: a number is none.
    """
    line = parse(words)
    sweeps, translated_words = bool({"-m", "--multirun"} & set(line.options)), []
    for word in line.overrides:
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if equals and name in COUNTED and value.lower() != "null":
            value = ",".join(str(count(one, name)) for one in (value.split(",") if sweeps else [value]))
        translated_words.append(f"{name}{equals}{value}")
    given = {word.partition("=")[0].lstrip("+") for word in translated_words}
    if "train.tokens" in given and "train.steps" not in given:
        translated_words.append("train.steps=null")
    line.overrides = translated_words
    assume(line)
    return line.argv()


def run(cfg: PlanRoot) -> None:
    """Answer, and write what was asked for.

    Raises:
        ConfigError: nothing fits, the layout that was asked for does not, or a file cannot be written.
    """
    from tools.planning import experiment, pictures, show
    from tools.planning.answer import answer

    file = experiment.target(cfg.plan.write) if cfg.plan.write else None
    _writable(str(file) if file and file.is_absolute() else cfg.plan.write, "plan.write")
    _writable(cfg.plan.output, "plan.output")
    if file and cfg.plan.output and file.absolute() == Path(cfg.plan.output).absolute():
        raise ConfigError(f"plan.write and plan.output are both {cfg.plan.write}", "name a file and a directory")
    result = answer(cfg, validate(cfg, trains=False))
    console = terminal.console()
    show.show(result, console)
    if not result.fits:
        raise does_not_fit(result)
    if file:
        _write(file, experiment.as_yaml(result.cfg, result.best))
        console.print(f"wrote {file}; {experiment.how_to_run(file)}", soft_wrap=True)
    if cfg.plan.output:
        from tools.planning import report

        folder = Path(cfg.plan.output)
        events = pictures.events(result.best)
        _write(folder / "pipeline.svg", pictures.svg(events, result.best.workload.layout.pp))
        _write(folder / "trace.json", pictures.trace(events))
        _write(folder / "plan.json", report.as_json(result))
        _write(folder / "report.html", report.html(result, (folder / "pipeline.svg").read_text(encoding="utf-8")))
        console.print(f"wrote report.html, pipeline.svg, trace.json and plan.json to {folder}", soft_wrap=True)


def does_not_fit(result: Answer) -> ConfigError:
    """The layout that was asked for needs more memory than its GPUs have."""
    needed, room = result.best.memory_bytes / 2**30, result.hardware.usable_bytes / 2**30
    return ConfigError(
        f"the layout of parallel.* needs {needed:,.1f} GiB on its peak rank, and {room:,.1f} of "
        f"cluster={result.hardware.name} can be used",
        "recompute more (recompute=full), use a larger parallel.pp, ep or tp, or plan.search=true to find what fits",
    )


def run_validation(cfg: PlanRoot) -> None:
    """Compare with published runs.

    Raises:
        ConfigError: the table cannot be read.
    """
    from tools.published import validation
    from tools.published.table import TABLE

    table = Path(cfg.plan.runs) if cfg.plan.runs else TABLE
    validation.run(table, cfg.plan.models, Path(cfg.plan.results) if cfg.plan.results else None)


def _writable(name: str | None, field: str) -> None:
    """Refuse before the search what could not be written after it."""
    if name is None:
        return
    path = Path(name).absolute()
    place = path
    while not place.exists():
        place = place.parent
    wrong = ""
    if not name or (field == "plan.write" and name.endswith("/")):
        wrong = "it is not a file name" if field == "plan.write" else "it is empty"
    elif place == path and path.is_dir() == (field == "plan.write"):
        wrong = "it is a directory" if path.is_dir() else "it is not a directory"
    elif place != path and not place.is_dir():
        wrong = f"{place} is not a directory"
    elif not os.access(place, os.W_OK):
        wrong = f"{place} is not writable"
    if wrong:
        raise ConfigError(f"{field}={name} cannot be written: {wrong}", f"name another {field}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", "name another plan.output or plan.write"
        ) from error


if __name__ == "__main__":
    main()
