"""`moe-train`: train a model on ranks that it starts on this machine, or that a launcher has started.

    moe-train experiment=tiny_tp2_pp2_ep2 run_dir=runs/first
    moe-train data=text data.path=corpus/ data.dir=data/mine train.tokens=10M
    moe-train parallel.tp=2 parallel.pp=2 optimizer.lr=3e-4
    moe-train -m optimizer.lr=1e-3,2e-3 run_dir=runs/sweep    one run for each
    srun moe-train ...               as ranks of a job; moe-submit does this

The same run_dir continues the run; resume=never starts it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from launch import quiet, rendezvous, restarts
from launch.local import forkserver, signals
from moe_train.config.schema import Config
from moe_train.resilience import stop
from parallel.errors import MoeTrainError

COMMON = (
    "experiment", "model", "parallel", "precision", "recompute", "data", "run_dir", "resume", "init_from",
    "train.tokens", "train.steps", "train.seq_length", "batch.global_batch_size", "batch.micro_batch_size",
    "optimizer.lr", "schedule.warmup_steps", "parallel.tp", "parallel.pp", "parallel.ep", "parallel.dp",
    "data.path", "data.dir", "checkpoint.interval_steps", "export_hf", "seed", "runtime",
)  # fmt: skip
"""What --help explains."""


def main(entry: str | None = None, about: str | None = __doc__, common: Sequence[str] = COMMON) -> NoReturn:
    """Console script, with the arguments of `run`. Exits with the codes of docs/slurm.md: 0 when done, 2 where the
    user's input is wrong, ..."""
    signals.leave(run(entry, about, common))


def run(entry: str | None = None, about: str | None = __doc__, common: Sequence[str] = COMMON) -> int:
    """What `main` does, returning the exit code. Each rank runs `entry`, which reads no data, in place of training.

    `about` and `common` are for --help.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        from moe_train.config.composition import compose

        if not rendezvous.is_reporting_rank():
            return 0
        return compose.hydra_entry(train_here, trains=False, about=about, common=common)
    from launch import failures

    try:
        code = _run(entry)
    except ImportError as error:  # before ranks have met, so each tells its own
        print(f"error: {failures.one_line(error)}", file=sys.stderr)
        code = failures.exit_code_of(error)
    if code:
        failures.leave_code(code)
    return code


def _run(entry: str | None) -> int:
    quiet.silence()
    try:
        info = rendezvous.detect()
    except MoeTrainError as error:
        if rendezvous.is_reporting_rank():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if info is not None:
        stop.listen(signals.WARNING)  # a warning may come while libraries are imported
        from launch import join

        return join.run(info, entry)
    from launch import sweep
    from moe_train.checkpoint import continuing
    from moe_train.config.composition import compose

    try:
        with signals.interruptible(last=True):
            words = [*sys.argv[1:], *restarts.overrides()]
            after = sweep.show if entry is None else None
            work = partial(train_here, entry=entry)
            return compose.hydra_entry(work, argv=words, revise=continuing.continued, after_sweep=after)
    except signals.Interrupted as interrupt:
        message = f"\ninterrupted by {interrupt.signal.name}; every rank has ended"
        if interrupt.signal == signals.WARNING:
            message = f"\nstopped by {interrupt.signal.name} before the first step; the same command continues"
        print(message, file=sys.stderr)
        return interrupt.exit_code
    finally:
        forkserver.kill()  # at once, even if it still imports


def train_here(cfg: Config, entry: str | None = None) -> None:
    """Run one job on this machine: training, or `entry` on each rank.

    Raises:
        MoeTrainError: the config is wrong, the data cannot be made, a package is missing, or a rank failed.
        signals.Interrupted: a signal told this process to end.
    """
    from launch import failures

    with failures.packages():
        _train_here(cfg, entry)


def _train_here(cfg: Config, entry: str | None) -> None:
    from moe_train.checkpoint import continuing
    from moe_train.config.composition.validate import validate

    layout = validate(cfg)
    if cfg.runtime == "simulated":
        from moe_train import simulate

        simulate.run(cfg)
        return
    if entry is None:
        from launch import room

        if why := continuing.nothing_to_do(cfg):
            print(why, flush=True)
            return
        room.check(cfg, layout)
    if cfg.runtime == "cpu" or not any(Path("/dev").glob("nvidia*")):
        forkserver.begin()  # it imports torch while this process does so too, and makes the data
    from launch import job, lock
    from launch.local import launcher
    from launch.slurm import commands

    job.resolve_runtime(cfg)
    if cfg.runtime == "cuda":
        job.check_gpus(layout, job.visible_gpus())
    if entry is not None:
        launcher.start(cfg, layout, entry)
        return
    commands.warn_unheard(cfg.launcher)
    job.prepare_data(cfg)
    with lock.held(cfg):
        continuing.set_aside(cfg)
        restarts.remember(cfg)
        launcher.start(cfg, layout)


if __name__ == "__main__":
    main()
