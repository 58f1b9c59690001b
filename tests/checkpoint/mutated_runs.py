"""Runs that resume mutated checkpoints, start from mutated weights, or are continued by a command line.

The judge is that of `mutations`: a typed error of exit code 2 in one line, or a checkpoint that a step of training
follows. In both cases no file of the run directory or of the weights is lost or changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from moe_train import train
from moe_train.checkpoint import checkpoint, continuing, hf_exchange, origin
from moe_train.config.composition.compose import compose, to_yaml
from moe_train.config.schema import Config
from moe_train.formats import manifest, run_directory
from moe_train.loop import step
from moe_train.run import Run, TrainState
from tests.checkpoint import mutations, small_run
from tests.checkpoint.mutations import UNREAD, Draw
from tests.conversion.convert import convert

SAMPLES = 8
RUN, EXPORTED, UNSIGNED, CONVERTED = "run", "exported", "unsigned", "converted"
"""Folders of the sources: a run directory; its weights in Hugging Face format, with and without a manifest, and as
moe-convert makes a Megatron checkpoint of them."""
FROM = "init_from "
OF_A_RUN = ("resume=auto", "resume by name", "continue")
USES = (*OF_A_RUN, *(f"{FROM}{name}" for name in (RUN, EXPORTED, UNSIGNED, CONVERTED)))


def write_sources(root: Path) -> None:
    """A run with the checkpoints of two steps, and its export."""
    cfg = small_run.config(root / RUN, {})
    run = small_run.prepare(cfg)
    for _ in range(2):
        small_run.train(run, 1)
        saved = checkpoint.save(run)
    (root / RUN / run_directory.CONFIG).write_text(to_yaml(cfg))
    exported = hf_exchange.export(run, saved)
    shutil.move(exported, root / EXPORTED)
    exported.parent.rmdir()
    shutil.copytree(root / EXPORTED, root / UNSIGNED)
    (root / UNSIGNED / run_directory.MANIFEST).unlink()
    convert(root / EXPORTED, root / CONVERTED)


@dataclass
class Case:
    """A checkpoint and the run that uses it.

    Args:
        what: names it, with the mutation.
        words: of the command line that makes `cfg`.
        place: directory of the checkpoint.
        weights: of `init_from`.
        refusal: the error of the rank; "" where there was none.
    """

    what: str
    cfg: Config
    words: Sequence[str]
    place: Path
    weights: Path | None
    refusal: str = ""


def _files(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of modification of every file below `root`."""
    stats = {str(path): path.lstat() for path in root.rglob("*")}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in stats.items() if not os.path.isdir(name)}


def _case(sources: Path, use: str, scratch: Path) -> Case:
    """A copy of the sources that `use` needs, and the run that uses it."""
    run_dir = scratch / "run"
    if use in OF_A_RUN:
        shutil.copytree(sources / RUN, run_dir)
        place, weights = run_dir / "checkpoints" / run_directory.name_of(2), None
        path = str(place) if use == "resume by name" else "auto"
        words, cfg = [f"resume={path}"], small_run.config(run_dir, {}, resume=path)
    else:
        run_dir.mkdir()
        weights = place = scratch / "weights"
        name = use.removeprefix(FROM)
        shutil.copytree(sources / (f"{RUN}/checkpoints/{run_directory.name_of(2)}" if name == RUN else name), weights)
        words, cfg = [f"init_from={weights}"], small_run.config(run_dir, {}, init_from=str(weights))
    return Case(use, cfg, [f"run_dir={run_dir}", *words], place, weights)


def _mutated(sources: Path, draw: Draw, scratch: Path) -> Case:
    """A case with a mutated file. Where the manifest is kept, it tells; a hostile author writes another one."""
    use = draw.choice(USES)
    case = _case(sources, use, scratch)
    case.cfg.checkpoint.verify = draw.random() < 0.7
    signature = draw.choice(("kept", "written again", "written again", "removed", "removed"))
    is_signed = (case.place / run_directory.MANIFEST).exists()
    if signature == "removed" and is_signed:
        _unsign(case.place)
    files = sorted(path for path in case.place.iterdir() if path.is_file() and path.name not in UNREAD)
    if use == "continue":
        files = [Path(case.cfg.run_dir, run_directory.CONFIG), case.place.parent / run_directory.LATEST]
    file = draw.choice(files)
    how = mutations.mutate(file, draw)
    if signature == "written again" and is_signed and file.name != run_directory.MANIFEST:
        manifest.write(case.place, manifest.describe(case.place, {}))
    case.what = f"{use}: {file.name}: {how}, manifest {signature}, verify={case.cfg.checkpoint.verify}"
    return case


def _unsign(place: Path) -> None:
    """Make it a checkpoint of a version without manifests."""
    (place / run_directory.MANIFEST).unlink()
    state = place / run_directory.STATE
    if state.exists():
        facts = json.loads(state.read_text())
        facts.pop("manifest", None)
        state.write_text(json.dumps(facts))


def _launch(case: Case) -> None:
    """What a command does before ranks start."""
    cfg = continuing.continued(case.cfg, case.words, compose)
    continuing.nothing_to_do(cfg)
    if case.weights is not None:
        origin.check(case.cfg.model, case.weights)


def _go_on(run: Run, case: Case) -> None:
    """What a rank does until after the first step."""
    run.resolved, run.run_dir = replace(run.resolved, cfg=case.cfg), Path(case.cfg.run_dir)
    run.state, run.total_steps = TrainState(), small_run.STEPS
    train.set_schedules(run)
    checkpoint.resume(run)
    train.set_length(run)
    if run.state.step < run.total_steps:
        data = train.train_reader(run, small_run.Samples(SAMPLES), run.state.consumed_samples, wrap=True).for_chunks(
            run.layout.vpp
        )
        step.train_step(run, data)
    for name, value in asdict(run.state).items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}={value!r}")


def judged(sources: Path, count: int, seed: int, scratch: Path) -> tuple[int, list[str]]:
    """How many of `count` mutations a rank refused, and what was wrong. Bounds the memory of this process."""
    run = small_run.prepare(small_run.config(scratch / "prepared", {}))
    mutations.bound_memory()
    wrong: list[str] = []
    refused = 0
    for use in USES:  # first without any mutation
        case = _case(sources, use, scratch)
        wrong += [f"{use}, undamaged: {error}" for error in (*_problems(run, case, scratch), case.refusal) if error]
    for number in range(count):
        case = _mutated(sources, Draw(f"{seed} {number}"), scratch)
        wrong += [f"{number}: {case.what}: {problem}" for problem in _problems(run, case, scratch)]
        refused += bool(case.refusal)
    return refused, wrong


def _problems(run: Run, case: Case, scratch: Path) -> list[str]:
    """What was wrong with how the launcher and a rank took it."""
    found: list[str] = []
    before = _files(scratch)
    for name, command in (("launcher", partial(_launch, case)), ("rank", partial(_go_on, run, case))):
        ended, after = mutations.ending(command), _files(scratch)
        lost = sorted(path for path, facts in before.items() if after.get(path) != facts)
        added = sorted(path for path in after.keys() - before.keys() if f"/{run_directory.BEGAN}/" not in path)
        found += [f"{name}: {ended.problem}"] * bool(ended.problem)
        found += [f"{name}: lost {lost}"] * bool(lost) + [f"{name}: left {added}"] * bool(added)
        case.refusal = str(ended.error or "")
    for path in scratch.iterdir():
        shutil.rmtree(path)
    return found
