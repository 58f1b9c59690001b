"""From the command line to one typed `Config`, through Hydra. No torch import.

Dataclass defaults < YAML groups under `conf/` < the command line. Every error of the user's is one line on stderr.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any, cast, overload

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from moe_train.config import former
from moe_train.config.composition import help, store
from moe_train.config.composition.command_line import escaped, for_hydra, sorted_words
from moe_train.config.composition.explain import (
    CONF_DIR,
    explain,
    one_line,
    refuse_lost_groups,
    unknown_field,
    unknown_option,
)
from moe_train.config.composition.validate import validate
from moe_train.config.roots import ROOTS
from moe_train.config.rules.values import check_values
from moe_train.config.schema import Config
from moe_train.config.walk import AnyConfig, all_fields, group_names
from moe_train.files import untrusted
from parallel.errors import ConfigError, MoeTrainError
from parallel.exit_codes import ExitCode
from parallel.suggest import override_value

_FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra then raises its errors instead of printing them in its own way
_PRINTS = {"-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info"}  # and the command ends
Revise = Callable[[Config, Sequence[str], Callable[[Sequence[str]], Config]], Config]
"""Makes another config of one, the overrides that led to it, and a function that composes others."""
# For the callback, which Hydra makes without arguments of ours.
_TRAINS = ContextVar("trains", default=True)
_REVISE: ContextVar[Revise | None] = ContextVar("revise", default=None)
_ROOT: ContextVar[type] = ContextVar("root", default=Config)


@overload
def compose(overrides: Sequence[str] = ()) -> Config: ...


@overload
def compose(overrides: Sequence[str], root: type[AnyConfig]) -> AnyConfig: ...


def compose(overrides: Sequence[str] = (), root: type = Config) -> Any:
    """The config that these overrides make, for tools and tests. Cross-field rules are left to `validate`.

    Args:
        root: what is composed, one of `moe_train.config.roots.ROOTS`.

    Raises:
        ConfigError: for an unknown field or option, a wrong type or bad syntax.
    """
    try:
        return _composed(overrides, root, ROOTS[root].config_name)
    except Exception as error:
        raise explain(error, overrides, root) or error from error


def _composed(overrides: Sequence[str], root: type, config_name: str) -> Any:
    refuse_lost_groups(overrides, root)
    store.register(root)
    with hydra.initialize_config_dir(str(CONF_DIR), job_name="moe-train", version_base="1.3"):
        return to_config(hydra.compose(config_name, overrides=for_hydra(overrides)), root)


def to_config(composed: DictConfig, root: type[AnyConfig]) -> AnyConfig:
    """A real config from Hydra's dictionary. Raises ConfigError for a field added with `+`, else OmegaConf's own."""
    _refuse_extra(composed, "", root)
    config = OmegaConf.to_object(composed)
    if not isinstance(config, root):
        begin = f"begin its defaults list with `{ROOTS[root].schema}`"
        raise ConfigError("the config is not built on moe_train's schema", begin)
    return config


def _refuse_extra(node: DictConfig, prefix: str, root: type) -> None:
    """`+key=value` gets past OmegaConf's check of unknown keys; the schema has no use for them."""
    for key in map(str, node):
        name = f"{prefix}{key}"
        if name in group_names(root):
            _refuse_extra(node[key], f"{name}.", root)
        elif name not in all_fields(root):
            value = node[key]
            if isinstance(value, DictConfig) and value:  # an unknown group: name the whole field
                inner = str(next(iter(value)))
                name, value = f"{name}.{inner}", value[inner]
            shown = None if isinstance(value, (DictConfig, ListConfig)) else str(value)
            raise unknown_field(name, shown, root)


def to_yaml(cfg: Config) -> str:
    """Every field of `cfg` as YAML, to be read back by `from_yaml`."""
    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def from_yaml(path: str | Path) -> Config:
    """The config in a file that `to_yaml` wrote, such as `run_dir/config.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        loaded = _literal(untrusted.read_yaml(Path(path)))
        if isinstance(loaded, dict):
            loaded = former.current(loaded)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", "name the config.yaml of a run directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "name the config.yaml of a run directory") from error
    try:
        return to_config(cast(DictConfig, OmegaConf.merge(schema(), loaded)), Config)
    except Exception as error:
        cause = explain(error)
        raise ConfigError(
            f"{path}: {cause.cause if cause else one_line(error)}", cause.remedy if cause else ""
        ) from error


@cache
def schema() -> DictConfig:
    """`Config` as OmegaConf's dictionary, to be merged with values and not to be changed. Made once, in 25 ms."""
    return cast(DictConfig, OmegaConf.structured(Config))


def _literal(node: Any) -> Any:
    """The values of a resolved config, in which `${` is text and not a reference."""
    if isinstance(node, dict):
        return {key: _literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_literal(value) for value in node]
    return escaped(node) if isinstance(node, str) else node


class _Stop(SystemExit):
    """Ends Hydra's work before it makes the output directory; Hydra lets only SystemExit out of a callback."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(2)


class ValidateBeforeOutput(Callback):
    """Hydra callback (conf/train.yaml) that checks a run's config, and only then makes its directory."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Stop where the config is wrong; nothing has been written yet."""
        try:
            # Read before the copy is made, so that both have the same second in the directory's name. `run_dir` comes
            # first, since an error names what is read. Hydra's directory is another one where the command has no runs.
            run_dir = str(config.run_dir)
            directory = str(config.hydra.run.dir) if run_dir else run_dir
            task = copy.deepcopy(config)
            with read_write(task), open_dict(task):
                del task["hydra"]
            _check(_revised(to_config(task, _ROOT.get()), config))
            _make_run_dir(directory)
        except Exception as error:
            raise _Stop(error) from error

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Stop where the directory of all jobs cannot be made; each job is checked when its turn comes."""
        try:
            _make_run_dir(config.hydra.sweep.dir)
        except Exception as error:
            raise _Stop(error) from error


def _check(cfg: Any) -> None:
    """Raise ConfigError where a value is impossible, or does not go with the others."""
    if isinstance(cfg, Config):
        validate(cfg, trains=_TRAINS.get())
    else:
        check_values(cfg)


def _revised(cfg: Any, composed: DictConfig) -> Any:
    """`cfg` as the command wants it. `composed` is all of Hydra's config of the job."""
    revise = _REVISE.get()
    if revise is None or not isinstance(cfg, Config):
        return cfg
    name = str(composed.hydra.job.config_name)

    def again(words: Sequence[str]) -> Config:
        return to_config(hydra.compose(name, overrides=list(words)), Config)

    return revise(cfg, job_words(composed.hydra), again)


def job_words(hydra_config: Any) -> list[str]:
    """The overrides of one job as Hydra has read them, references included."""
    return [str(word) for word in cast(list[str], OmegaConf.to_container(hydra_config.overrides.task, resolve=False))]


def _make_run_dir(name: str) -> None:
    """The directory, made just before Hydra would, so that a refusal names the field."""
    remedy = f"use run_dir={Config().run_dir}"
    if not name.strip():
        raise ConfigError(f"run_dir={override_value(name)} is empty", remedy)
    if "${" in name:
        raise ConfigError(f"run_dir={name} has ${{ in its name, which Hydra takes for a reference", remedy)
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"run_dir={name} cannot be written: {reason}", remedy) from error
    if not os.access(name, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={name} cannot be written: {os.strerror(errno.EACCES)}", remedy)


def hydra_entry(
    fn: Callable[[Any], None],
    argv: Sequence[str] | None = None,
    *,
    root: type = Config,
    trains: bool = True,
    runs: bool = True,
    answers: bool = False,
    about: str | None = None,
    revise: Revise | None = None,
    common: Sequence[str] = (),
    flags: Sequence[str] = (),
    after_sweep: Callable[[list[SweepJob]], None] | None = None,
) -> int:
    """Run `fn` on the config of the command line, once, or once for each job of a sweep (-m). Returns the exit code.

    All of Hydra's own options work (--cfg job, -m, --help, ...). The run_dir of a run is Hydra's output directory of
    the job.
    Errors of the user's end as one line `error: cause; remedy` on stderr and exit code 2, other typed errors with their
    own code. `-v`, verbose=true or HYDRA_FULL_ERROR=1 show the traceback too. An untyped error of `fn` is a bug: its
    traceback is always shown, and the code is 1.

    Args:
        root: what the command composes, one of `moe_train.config.roots.ROOTS`; `fn` gets an instance of it. The rules
            between fields are those of a run: other roots are checked field by field.
        trains: whether the command is to train, so that rules about training apply.
        runs: whether it has a use for the output directory. Else, where the command line has none of Hydra's options,
            the config is composed once and Hydra makes no job of it, which saves a fifth of a second.
        answers: whether it only prints, although rules about training apply: it then ends quietly where its reader is
            gone (`| head`).
        about: text that --help prints instead of Hydra's page.
        revise: makes the config that is validated and run of the composed one, for each job.
        common: the groups and fields that --help explains.
        flags: options of the command itself, which it has taken from `argv`, to suggest one that is misspelled.
        after_sweep: is given the jobs of a sweep once all have ended.
    """
    before, before_revise, before_root = _TRAINS.set(trains), _REVISE.set(revise), _ROOT.set(root)
    if sys.stdout is None:  # closed by the process that started it: output is lost
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        entry = _Entry(fn, answers or not trains, root, runs)
        page = partial(help.page, about, common, root) if about else None
        code = _run(entry, argv, runs, page, flags)
        try:
            sys.stdout.flush()  # Hydra prints without that, and at exit it is too late for one line
        except OSError as error:
            entry.report(error)
            code = code or entry.exit_code
        if after_sweep is not None and len(entry.jobs) > 1:
            after_sweep(entry.jobs)
        return code
    finally:
        _TRAINS.reset(before)
        _REVISE.reset(before_revise)
        _ROOT.reset(before_root)


def _run(
    entry: _Entry,
    argv: Sequence[str] | None,
    runs: bool,
    page: Callable[[], str] | None,
    flags: Sequence[str],
) -> int:
    options = [
        "verbose=true" if word in ("-v", "--verbose") else word for word in (sys.argv[1:] if argv is None else argv)
    ]
    entry.given([word for word, is_override in sorted_words(options) if is_override])
    entry.only_prints = any(word.partition("=")[0] in _PRINTS for word in options)
    try:
        if page and {"-h", "--help"} & set(options):
            print(page(), flush=True)
            return 0
        with _one_line_usage(options, flags):
            get_args_parser().parse_args(options)
        refuse_lost_groups(entry.overrides, entry.root)
        config_name = ROOTS[entry.root].config_name
        if not runs and options == entry.overrides:
            entry.work(lambda: _composed(options, entry.root, config_name))
            return entry.exit_code
        store.register(entry.root)
        with contextlib.ExitStack() as stack:
            if not runs:  # a job of Hydra has a directory, where nothing is to stay
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-"))
                options += [f"hydra.run.dir={scratch}/run", f"hydra.sweep.dir={scratch}/run"]
            stack.enter_context(_replaced_argv(for_hydra(options)))
            stack.enter_context(_environment(_FULL_ERROR, "1"))
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(entry.job)()
    except _Stop as stop:
        entry.report(stop.error)
    except SystemExit as end:  # --help and the like
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except Exception as error:
        entry.report(error)
    return entry.exit_code


@dataclasses.dataclass(frozen=True)
class SweepJob:
    """How one job of a sweep ended."""

    words: list[str]
    """Its overrides."""
    run_dir: str
    exit_code: int
    seconds: float


class _Entry:
    """Runs jobs for Hydra and reports their errors; Hydra itself sees every job succeed, or it would print its own."""

    def __init__(self, fn: Callable[[Any], None], answers: bool, root: type, runs: bool) -> None:
        self.fn, self.root, self.runs, self.exit_code, self.prefix = fn, root, runs, 0, ""
        self.overrides: list[str] = []
        self.jobs: list[SweepJob] = []
        self.answers, self.only_prints = answers, False
        self.user_environment = os.environ.get(_FULL_ERROR)
        self.verbose = self.user_environment == "1"

    def given(self, overrides: list[str]) -> None:
        """What the command line has, for messages."""
        self.overrides = overrides
        self.verbose = self.verbose or "verbose=true" in overrides

    def job(self, composed: DictConfig) -> None:
        """One job. Its error is reported, and the next job of a sweep still runs."""
        hydra_config = HydraConfig.get()
        output = Path(hydra_config.runtime.output_dir)
        self.prefix = "" if OmegaConf.is_missing(hydra_config.job, "num") else f"job {hydra_config.job.num}: "

        def config() -> Any:
            cfg: Any = to_config(composed, self.root)
            if isinstance(cfg, Config) and self.runs:
                cfg.run_dir = str(output)
            return _revised(cfg, OmegaConf.create({"hydra": hydra_config}))

        started, before, self.exit_code = time.monotonic(), self.exit_code, 0
        self.work(config)
        self.jobs.append(SweepJob(job_words(hydra_config), str(output), self.exit_code, time.monotonic() - started))
        self.exit_code = before or self.exit_code
        _remove_empty(output)  # not every command writes there

    def work(self, config: Callable[[], Any]) -> None:
        """What is to be done with a config, which may turn out to be wrong."""
        try:
            cfg = config()
            self.verbose = self.verbose or cfg.verbose
            _check(cfg)
        except Exception as error:
            self.report(error)
            return
        try:
            with _environment(_FULL_ERROR, self.user_environment):
                self.fn(cfg)
                sys.stdout.flush()
        except MoeTrainError as error:
            self.report(error)
        except Exception as error:
            self.report_bug(error)

    def report(self, error: Exception) -> None:
        """One line for an error of composition, or a typed one."""
        known = explain(error, self.overrides, self.root) or _unprinted(error)
        if known is None:
            self.report_bug(error)
            return
        if self.verbose:
            traceback.print_exception(error)
        self._print(one_line(known), known.exit_code)

    def report_bug(self, error: Exception) -> None:
        """An unexpected error, for which a developer needs the traceback.

        A command that only prints ends quietly where its reader is gone, and with a line where the disk is full. A run
        must not end unnoticed.
        """
        prints = self.only_prints or self.answers
        if prints and isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough (| head)
            # The exit code of an answer may say that a plan does not fit, and that is lost: 1, as rich does.
            self.exit_code = self.exit_code if self.only_prints else self.exit_code or 1
            return
        if prints and (lost := _unprinted(error)):
            self._print(one_line(lost), lost.exit_code)
            return
        traceback.print_exception(error)
        self._print(f"{type(error).__name__}: {one_line(error)}", 1)

    def _print(self, line: str, exit_code: int) -> None:
        print(f"error: {self.prefix}{line}", file=sys.stderr, flush=True)
        self.exit_code = self.exit_code or exit_code


def _unprinted(error: Exception) -> MoeTrainError | None:
    """What a full disk says behind `command > FILE`; None for every other error."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        return MoeTrainError(f"the output cannot be written: {error.strerror}", "send it elsewhere")
    return None


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # a directory with anything in it stays
        directory.rmdir()


@contextlib.contextmanager
def _one_line_usage(options: Sequence[str], flags: Sequence[str]) -> Iterator[None]:
    """argparse prints its usage, many lines long, before an error: keep the error."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        message = captured.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        unknown = message.removeprefix("unrecognized arguments: ")
        if message != unknown:
            raise unknown_option(unknown.split()[0], options, flags) from None
        raise ConfigError(f"command line: {message}", "use KEY=VALUE overrides and the options of --help") from None


@contextlib.contextmanager
def _replaced_argv(options: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [before[0] if before else "moe-train", *options]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """The environment variable set to `value` (None: unset) inside the block."""
    before = os.environ.get(name)

    def put(text: str | None) -> None:
        if text is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = text

    put(value)
    try:
        yield
    finally:
        put(before)
