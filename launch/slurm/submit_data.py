"""`moe-submit data`: check a dataset's configuration on a login node, and give `launch/data.sbatch` to Slurm. No torch.

The submission is kept in data.dir/submissions/TIME, with a copy of the code. `moe-submit status|cancel|logs DATA_DIR`
follow it.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from launch.slurm import commands, container, status, submission
from moe_train.config.composition.compose import hydra_entry, job_words
from moe_train.config.schema import Config
from moe_train.data.files import sources_of
from parallel.errors import ConfigError, LaunchError

_DRY = "--dry-run"
_COMMON = (
    "data", "data.path", "data.sources", "data.dir", "data.tokenizer", "data.near_duplicates", "data.prepare_workers",
    "data.prepare_memory_mib", "launcher.nodes", "launcher.partition", "launcher.account", "launcher.time_limit_min",
    "launcher.container",
)  # fmt: skip
_ABOUT = """`moe-submit data`: give a job to Slurm that makes a dataset, with one task of moe-data on each node.

    moe-submit data data=text data.path=/shared/text data.dir=/shared/corpus launcher.nodes=4
    moe-submit data --dry-run ...    print the command without submitting it

It takes the overrides of moe-data.
"""


def run(words: Sequence[str]) -> int:
    """What `moe-submit data` does with these words. Returns the exit code."""
    dry = _DRY in words
    rest = [word for word in words if word != _DRY]

    def job(cfg: Config) -> None:
        with contextlib.suppress(OSError):  # Hydra has made it
            Path(cfg.run_dir).rmdir()
        _submit(cfg, dry)

    return hydra_entry(job, rest, trains=False, runs=True, about=_ABOUT, common=_COMMON, flags=[_DRY])


def _submit(cfg: Config, dry: bool) -> None:
    """Give the job to Slurm, or print the command.

    Raises:
        ConfigError, DataError: the text is not there, or Slurm refuses the job.
        LaunchError: Slurm is not on this machine.
    """
    if cfg.data.source == "none":
        raise ConfigError("data.source=none has no text to make a dataset of", "use data=text data.path=FILES")
    size = sum(file.stat().st_size for source in sources_of(cfg.data) for file in source.files)
    directory = Path(cfg.data.dir).resolve()
    container.check(cfg.launcher)
    nodes = cfg.launcher.nodes or 1
    unchecked = "" if commands.installed() else "Slurm is not on this machine"
    notes = [] if unchecked else commands.check(cfg, nodes, 0)
    print(f"data    {size / 1e6:,.0f} MB of text to {directory}\nnodes   {nodes:,}, with one task each")
    for note in [*notes, *([f"partition, account and limits are not checked: {unchecked}"] if unchecked else [])]:
        print(f"note    {note}")
    place = directory / submission.FOLDER / time.strftime("%Y-%m-%d_%H-%M-%S")
    hydra = HydraConfig.get()
    options = submission.options()
    overrides = [submission.for_job(word, cfg) for word in job_words(hydra)]
    script = str(commands.DATA_SCRIPT if dry else place / "code/launch/data.sbatch")
    command = ["sbatch", "--parsable", *commands.data_flags(cfg, directory), script, *options.words(place), *overrides]
    variables = commands.data_environment(cfg, place)
    if dry:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command]))
        return
    if unchecked:
        raise LaunchError("sbatch is not on this machine", f"run on a login node of the cluster, or with {_DRY}")
    status.refuse_active(str(directory))
    submission.take(cfg, place, options)
    record = submission.Submission(command, variables)
    try:
        record.submit()
    except LaunchError as error:
        raise ConfigError(f"Slurm refuses the job: {error.cause}", "see the fields of launcher") from error
    submission.write(record, place)
    print(f"submitted {record.jobs[0]}; follow with: moe-submit status {directory}")
