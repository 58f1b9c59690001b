"""What a run continues from: its checkpoint, and its own config with the changes of a command line. No torch import.

`moe-train run_dir=R` continues R unchanged. Everything that the command line does not name keeps its value from
R/config.yaml; what a run must not change unnoticed is refused here, before a process starts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_train.config import former
from moe_train.config.resolve import total_steps
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, get, group_names, typed, violation, with_values
from moe_train.files import untrusted
from moe_train.formats import manifest, run_config, run_directory, state_file
from parallel.errors import CheckpointError, ConfigError, one_line
from parallel.suggest import override

SUMMARY, EXPORTS = "summary.json", "hf"
"""Names in run_dir."""
_EARLIER = "earlier"
_OF_THE_COMMAND = ("run_dir", "resume", "verbose", "rank", "launcher.dependency")
_OF_A_RUN = (
    "metrics.jsonl", "events.out.*", "config.yaml", SUMMARY, "loss.svg", EXPORTS, "injected", "heartbeats", "hung.txt",
    run_directory.BEGAN,
)  # fmt: skip
_LENGTHS = ("train.steps", "train.tokens")
_LENGTH_OF_THE_RUN = (*_LENGTHS, "train.seq_length", "batch.global_batch_size")
_PERMISSIONS = ("schedule.on_resume", "data.on_resume")
_SHOWN = 4
_LAST = "run_dir"
"""Field that every version writes behind all groups of config.yaml. A file that was cut off can be valid YAML."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from."""

    path: Path
    config: dict[str, Any]
    """As the checkpoint has it."""
    position: run_config.Position


def continued(cfg: Config, words: Sequence[str], compose: Callable[[Sequence[str]], Config]) -> Config:
    """`cfg`, or where run_dir holds a run the config of that run with what `words` change.

    A run that ended before its first checkpoint keeps its config too. Nothing was trained, so that every field may
    change.

    Args:
        cfg: what the command line makes of the defaults.
        words: the overrides of the command line.
        compose: makes a config of overrides.

    Raises:
        CheckpointError: the run may not continue the checkpoint.
        ConfigError: run_dir holds another run than `resume` names, or neither a checkpoint nor its config can be read.
    """
    if cfg.resume == "never":
        return cfg
    base = _base(cfg)
    if base is None:
        return cfg
    named, optional = _asked(cfg, words, compose)  # which may compose again, and that takes a while
    optional -= {name for name in former.DEFAULTS if _keeps_former_default(name, base, cfg)}
    if "schedule.warmup_steps" in optional:
        cfg = _with_length_of(base, cfg, named | optional, words, compose)
    merged = _merged(base, cfg, named, optional)
    resume_point = find(merged)
    if resume_point is None:
        if not any(_candidates(merged)):  # else none can be read here, and ranks say why
            _tell_of_a_new_start(merged, cfg)
        return merged
    if cfg.resume != "auto":
        _refuse_another_run(merged, resume_point)
    before = config_of(resume_point.config, resume_point.path / run_directory.CONFIG)
    consumed = {name: get(Config(), name) for name in _PERMISSIONS if get(before, name) == get(base, name)}
    merged = with_values(merged, {name: value for name, value in consumed.items() if name not in named})
    run_config.check_model(resume_point.config, merged, resume_point.path)
    run_config.check_data(resume_point.config, merged, resume_point.path)
    set_by_user = {name for name in all_fields() if name in named or get(merged, name) == get(base, name)}
    return run_config.check_schedule(before, merged, resume_point.position, set_by_user)


def find(cfg: Config) -> ResumePoint | None:
    """The checkpoint that `resume` means and that this machine can read; None where there is none.

    The files read here are compared with the manifest. Ranks verify the others, and take an earlier checkpoint where
    one is damaged.

    Raises:
        CheckpointError: it is of a version with another format.
    """
    for path in _candidates(cfg):
        try:
            if cfg.checkpoint.verify:
                manifest.check_some(path, (run_directory.CONFIG, run_directory.STATE))
            config, state = run_config.read(path), run_directory.read_state(path)
            if _LAST not in config:
                continue
            position = run_config.Position(*state_file.position(state))
        except (run_directory.DamagedCheckpoint, ValueError):
            continue
        return ResumePoint(path, config, position)
    return None


def nothing_to_do(cfg: Config) -> str:
    """Why no rank needs to start, in one line; "" where there is something to train, report or export."""
    resume_point = None if cfg.resume == "never" else find(cfg)
    if resume_point is None or not _is_within(resume_point.path, cfg.checkpoint_root):
        return ""
    total = total_steps(cfg, resume_point.position.step, resume_point.position.tokens)
    if resume_point.position.step < total or not is_reported(cfg, resume_point.path):
        return ""
    if cfg.export_hf and not is_exported(cfg, resume_point.path):
        return ""
    progress = f"step {resume_point.position.step} of {total}"
    return (
        f"nothing to do: run_dir={cfg.run_dir} is at {progress}; a larger train.steps or "
        "train.tokens continues it, another run_dir starts another run"
    )


def is_reported(cfg: Config, checkpoint: Path) -> bool:
    """Whether the summary was written after this checkpoint, the last of the run."""
    return _is_newer(Path(cfg.run_dir, SUMMARY), checkpoint)


def is_exported(cfg: Config, checkpoint: Path) -> bool:
    """Whether this checkpoint was exported, completely."""
    return _is_newer(export_of(cfg, checkpoint) / run_directory.MANIFEST, checkpoint)


def export_of(cfg: Config, checkpoint: Path) -> Path:
    """Where a checkpoint is exported to."""
    return Path(cfg.run_dir, EXPORTS, checkpoint.name)


def set_aside(cfg: Config) -> Path | None:
    """Move what an earlier run left in run_dir to a directory of its own, where resume=never begins another one there.

    Two runs in one directory would mix: a damaged checkpoint of one is replaced by an older one of the other.

    Raises:
        ConfigError: it cannot be moved.
    """
    root = cfg.checkpoint_root
    if cfg.resume != "never" or not run_directory.candidates(root):
        return None
    stamp = f"{_EARLIER}_{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"
    place = Path(cfg.run_dir, stamp)
    try:
        if _is_within(root, Path(cfg.run_dir)):
            _move(root, place / root.name)
        else:
            for path in [*run_directory.candidates(root), root / run_directory.LATEST]:
                _move(path, root / stamp / path.name)
        for pattern in _OF_A_RUN:
            for path in Path(cfg.run_dir).glob(pattern):
                _move(path, place / path.name)
    except OSError as error:
        raise ConfigError(
            f"resume=never begins another run in run_dir={cfg.run_dir}, and what is there cannot be moved: {error}",
            "set another run_dir",
        ) from error
    print(f"run_dir={cfg.run_dir} held an earlier run, which is now in {place}", file=sys.stderr, flush=True)
    return place


def _move(path: Path, target: Path) -> None:
    if os.path.lexists(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)


def _base(cfg: Config) -> Config | None:
    """The config of the run that `cfg` continues; None where there is none that can be read."""
    own = Path(cfg.run_dir, run_directory.CONFIG)
    stored: Config | None = None
    if own.is_file():
        try:
            values = untrusted.read_yaml(own)
            if isinstance(values, Mapping) and _LAST not in values:
                raise ValueError(f"it was cut off: {_LAST} is missing")
            stored = config_of(values, own)
        except (OSError, ValueError, CheckpointError) as error:
            why = str(error).splitlines()[0]
            own = Path(_shown(own))
            if not any(_candidates(cfg)):
                raise ConfigError(
                    f"{own} cannot be read ({why}), and the run has no checkpoint",
                    "restore the file from a copy, or begin another run there with resume=never",
                ) from error
            _say_once(f"warning: {own} cannot be read ({why}), and the newest checkpoint's config takes its place")
    if cfg.resume == "auto" and stored is not None:
        return stored
    resume_point = find(cfg)
    if resume_point is None:
        return None
    base = config_of(resume_point.config, resume_point.path / run_directory.CONFIG)
    if cfg.resume == "auto":
        return base
    # The run that wrote the checkpoint keeps its own places.
    elsewhere = cfg if stored is None else stored
    return with_values(base, {"init_from": None, "checkpoint.dir": elsewhere.checkpoint.dir})


def _tell_of_a_new_start(merged: Config, cfg: Config) -> None:
    """Say which fields of a run without a checkpoint come from its config.yaml. `cfg` is the command line alone."""
    resolved = {"runtime"} if cfg.runtime == "auto" else set()
    taken = [name for name in all_fields() if get(merged, name) != get(cfg, name) and name not in resolved]
    if not taken:
        return
    shown = " ".join(override(name, get(merged, name)) for name in taken[:_SHOWN])
    more = "" if len(taken) <= _SHOWN else f" and {len(taken) - _SHOWN} more"
    own = _shown(Path(cfg.run_dir, run_directory.CONFIG))
    _say_once(f"no checkpoint yet: the run begins with {own} ({shown}{more}); resume=never takes the defaults")


def _shown(path: Path) -> str:
    """One name for a path, which is relative in the command line and absolute in the job."""
    absolute = os.path.abspath(path)
    return os.path.relpath(absolute) if absolute.startswith(os.getcwd() + os.sep) else absolute


_told: set[str] = set()


def _say_once(line: str) -> None:
    """A config is looked at before its directory is made, and again when its job begins."""
    if line not in _told:
        _told.add(line)
        print(one_line(line), file=sys.stderr, flush=True)


def _merged(base: Config, cfg: Config, named: set[str], optional: set[str]) -> Config:
    """`base` with the values of `cfg` for the fields that the command line names, or sets through an option."""
    taken = named | optional
    if given := [name for name in _LENGTHS if name in taken and get(cfg, name) is not None]:
        taken |= set(_LENGTHS) if len(given) == 1 else set()
    taken |= {name for name in all_fields() if name in _OF_THE_COMMAND}
    merged = with_values(base, {name: get(cfg, name) for name in taken})
    is_gone = merged.init_from and "init_from" not in named and not os.path.exists(merged.init_from)
    if is_gone and any(_candidates(merged)):
        if not Path(merged.run_dir, run_directory.BEGAN).is_dir():
            _say_once(
                f"warning: init_from={merged.init_from} is gone: the checkpoints have its weights, and an export will "
                "lack the other files that came with them"
            )
        merged = replace(merged, init_from=None)
    return merged


def _asked(
    cfg: Config, words: Sequence[str], compose: Callable[[Sequence[str]], Config]
) -> tuple[set[str], set[str]]:  # fmt: skip
    """Fields that `words` name, and those that they set through an option of a group or an experiment."""
    named: set[str] = set()
    optional: set[str] = set()
    for word in words:
        name = word.partition("=")[0].lstrip("+~").partition("@")[0]
        if name in group_names():
            optional |= {field for field in all_fields() if field.startswith(f"{name}.")}
        else:
            named |= {field for field in all_fields() if field == name or name.startswith(f"{field}.")}
    if any(_is_experiment(word) for word in words):
        without = compose([word for word in words if not _is_experiment(word)])
        optional |= {field for field in all_fields() if get(without, field) != get(cfg, field)}
    return named, optional - named


def _with_length_of(
    base: Config, cfg: Config, asked: set[str], words: Sequence[str], compose: Callable[[Sequence[str]], Config]
) -> Config:  # fmt: skip
    """`cfg` composed with the length of the run: an option of the schedule derives the warm-up from it."""
    missing = [name for name in _LENGTH_OF_THE_RUN if name not in asked and get(base, name) != get(cfg, name)]
    if asked & set(_LENGTHS):
        missing = [name for name in missing if name not in _LENGTHS]
    if not missing:
        return cfg
    return compose([*words, *(override(name, get(base, name)) for name in missing)])


def _keeps_former_default(name: str, base: Config, cfg: Config) -> bool:
    """Whether a run of an earlier version keeps its value of a field that an option of the group does not set."""
    return bool(get(base, name) == former.DEFAULTS[name] and get(cfg, name) == get(Config(), name))


def _is_experiment(word: str) -> bool:
    return word.partition("=")[0].lstrip("+") == "experiment"


def config_of(values: Any, where: Path) -> Config:
    """The config in `values`. Fields that this version does not know are left out; those that are missing have the
    default of the versions that lacked them.

    Raises:
        CheckpointError: it is not the config of a run, or a field has a value that it cannot have.
    """
    remedy = "restore the file from a copy"
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} is not the config of a run", remedy)
    current = former.current(values)
    for group in group_names():
        if not isinstance(current.get(group), Mapping | None):  # nothing follows the name where a file is cut off
            raise CheckpointError(f"{where} has {group}={current[group]}, which is not a group of fields", remedy)
    values_by_name: dict[str, Any] = {}
    for name in all_fields():
        value = current
        for part in name.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            continue
        if why := violation(name, value):
            raise CheckpointError(f"{where} has {name}={value}, which is {why}", remedy)
        values_by_name[name] = typed(name, value)
    return with_values(Config(), values_by_name)


_MISSING = object()


def _candidates(cfg: Config) -> Iterator[Path]:
    """Checkpoints from which `cfg` may continue, best first: of those on this node's disk the ones that are newer."""
    if cfg.resume not in ("auto", "never"):
        try:
            yield from run_directory.resolve(Path(cfg.resume), "resume")
        except (CheckpointError, OSError):  # which a rule or a rank tells
            return
        return
    root = cfg.checkpoint_root
    shared = run_directory.candidates(root)
    near = run_directory.node_local_dir(cfg, root)
    newest = run_directory.step_of(shared[0].name) if shared else -1
    yield from (
        [] if near is None else [p for p in run_directory.candidates(near) if run_directory.step_of(p.name) > newest]
    )
    yield from shared


def _refuse_another_run(cfg: Config, resume_point: ResumePoint) -> None:
    """Raise ConfigError where run_dir holds a run of its own that `resume=PATH` is not about."""
    root = cfg.checkpoint_root
    there = run_directory.candidates(root)
    if there and not _is_within(resume_point.path, root):
        raise ConfigError(
            f"resume={cfg.resume} would begin another run in run_dir={cfg.run_dir}, whose own is at {there[0].name}",
            "set another run_dir, or leave resume out to continue the one that is there",
        )


def _is_within(path: Path, place: Path) -> bool:
    return path.resolve().is_relative_to(place.resolve())


def _is_newer(file: Path, checkpoint: Path) -> bool:
    try:
        return file.stat().st_mtime_ns >= (checkpoint / run_directory.STATE).stat().st_mtime_ns
    except OSError:
        return False
