"""The code and config of a submission, kept in the run's directory: what runs is what was submitted. No torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from launch.slurm import commands
from moe_train.config.composition import compose
from moe_train.config.composition.command_line import PATHS, field_of, is_text, text_override
from moe_train.config.schema import Config
from moe_train.config.walk import get
from moe_train.files import atomic, untrusted
from parallel.errors import ConfigError, LaunchError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("parallel", "moe_train", "launch", "tools", "conf")
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
              "CUDA_VISIBLE_DEVICES", "MOE_RENDEZVOUS")  # fmt: skip
_OF_A_JOB = ("SLURM_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MPI_", "HYDI_")
_CONFIG_NAME = "train"
_JOB = re.compile(r"[0-9]+")
FOLDER, FACTS = "submissions", "submission.json"


@dataclass
class Submission:
    """What `moe-submit` remembers of a submission, in run_dir/submissions/TIME/submission.json."""

    command: list[str]
    environment: dict[str, str]
    jobs: list[str] = field(default_factory=list)

    def submit(self, *more: str) -> str:
        """Give the command to Slurm, with `more` flags. Returns the number of the job, which is also noted.

        Raises:
            LaunchError: Slurm refuses it.
        """
        name, first, *rest = self.command
        answer = commands.run(name, first, *more, *rest, environment=clean(os.environ) | self.environment)
        self.jobs.append(answer.strip().partition(";")[0])
        return self.jobs[-1]


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """What a new job may inherit: nothing of a job that this process belongs to, and no rank of it. sbatch hands all
    it gets to the job, where Slurm sets its own, but the rank of a process would be taken for torchrun's."""
    return {
        name: value for name, value in environment.items()
        if name == "SLURM_CONF" or not (name in _OF_A_RANK or name.startswith(_OF_A_JOB))
    }  # fmt: skip


@dataclass(frozen=True)
class ConfigSources:
    """Where the command line told Hydra to find YAML files: the job finds copies of them.

    Args:
        config_dir: directory of `--config-dir`, or None.
        config_name: of `--config-name`, or None for the usual one.
    """

    config_dir: str | None = None
    config_name: str | None = None

    def words(self, directory: Path) -> list[str]:
        """The options of a job whose submission is kept in `directory`."""
        options = [] if self.config_dir is None else [f"--config-dir={directory / 'conf'}"]
        return options + ([] if self.config_name is None else [f"--config-name={self.config_name}"])


def options() -> ConfigSources:
    """Those of this process, in a Hydra job."""
    hydra = HydraConfig.get()
    given = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    name = hydra.job.config_name
    return ConfigSources(given[0] if given else None, None if name in (None, _CONFIG_NAME) else name)


def for_job(word: str, cfg: Config) -> str:
    """An override as a batch job gets it: paths absolute, references replaced by what they refer to."""
    info = field_of(word)
    if info is None:
        return word
    value = get(cfg, info.name)
    if info.name in ("data.blend", "data.sources"):
        absolute = [replace(entry, path=os.path.abspath(entry.path)) for entry in value]
        return text_override(info.name, absolute)
    if not is_text(info) or value is None:
        return word
    if info.name in PATHS and value and (info.name, value) not in (("resume", "auto"), ("resume", "never")):
        value = os.path.abspath(value)
    return text_override(info.name, value)


def _only_yaml(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".yaml", ".yml")) and not Path(folder, name).is_dir()]


def take(cfg: Config, directory: Path, given: ConfigSources | None = None) -> Path:
    """Copy the project's code to `directory`/code, with the commit, what differs from it, and the resolved config; and
    YAML files of `--config-dir` to `directory`/conf.

    Raises:
        LaunchError: it cannot be written.
    """
    try:
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, directory / "code" / name, ignore=ignored)
        if given is not None and given.config_dir is not None:
            shutil.copytree(given.config_dir, directory / "conf", ignore=_only_yaml)
        (directory / "config.yaml").write_text(compose.to_yaml(cfg), encoding="utf-8")
        if _git("ls-files", "--error-unmatch", "moe_train/__init__.py") is not None:
            for name, words in {"commit.txt": ["rev-parse", "HEAD"], "changes.diff": ["diff", "HEAD"]}.items():
                if (output := _git(*words)) is not None:
                    (directory / name).write_bytes(output)
    except OSError as error:
        raise LaunchError(f"{directory} cannot be written: {error.strerror}", "set run_dir=PATH") from error
    return directory / "code"


def _git(*words: str) -> bytes | None:
    """Output of git in the folder of the code; None where git fails or is missing.

    An installed package is not tracked, and may lie in a virtual environment inside of somebody else's repository.
    """
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def write(submission: Submission, directory: Path) -> None:
    """Write the facts into the directory of the submission, once Slurm has its jobs.

    Raises:
        LaunchError: they cannot be written. It names the jobs, which exist.
    """
    try:
        atomic.write_text(directory / FACTS, json.dumps(asdict(submission), indent=1) + "\n")
    except OSError as error:
        jobs = " ".join(submission.jobs)
        raise LaunchError(
            f"jobs {jobs} are submitted, but {directory / FACTS} cannot be written: {error.strerror}",
            f"moe-submit may not find them: follow them with squeue, or scancel {jobs} and submit again",
        ) from error


def newest_place(run_dir: str | Path) -> Path:
    """Directory of the newest submission of a run.

    Raises:
        ConfigError: there is none.
    """
    facts = sorted(Path(run_dir).glob(f"{FOLDER}/*/{FACTS}"))
    if not facts:
        raise ConfigError(f"{run_dir} is not the directory of a run that moe-submit started", "name its run_dir")
    return facts[-1].parent


def newest(run_dir: str | Path) -> Submission:
    """The newest submission of a run. Raises ConfigError where there is none."""
    return read(newest_place(run_dir))


def read(directory: Path) -> Submission:
    """The facts in the directory of a submission.

    Raises:
        ConfigError: they cannot be read, or are damaged.
    """
    path = directory / FACTS
    try:
        submission = Submission(**untrusted.read_object(path))
        environment = submission.environment
        if not (_are_texts(submission.command) and _are_texts(submission.jobs) and isinstance(environment, dict)
                and _are_texts([*environment.values()])):  # fmt: skip
            raise ValueError("it does not describe a submission")
        for job in submission.jobs:  # which scontrol and scancel get, and might take for an option
            if not _JOB.fullmatch(job):
                raise ValueError(f"{job[:100]!r} is not the number of a job")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "submit the run again with moe-submit") from error
    return submission


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
