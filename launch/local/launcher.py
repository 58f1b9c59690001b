"""Starts the ranks of a layout on this machine."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from launch import env, failures, job, restarts
from launch.local import rank, signals
from launch.local.processes import RankProcesses
from moe_train.config import resolve
from moe_train.config.schema import Config, LauncherConfig
from moe_train.resilience import stop
from parallel.exit_codes import NOT_RETRIED
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

ENTRY = "moe_train.train:run"
"""What each rank calls, as module:function, with the config and its `RankInfo`."""

_HOST = "127.0.0.1"


def start(cfg: Config, layout: ParallelLayout, entry: str | None = None) -> None:
    """Run `entry` (null: `ENTRY`) on every rank of `layout` and return when all are done; `cfg.runtime` is cuda or cpu.

    Rank 0 owns the terminal; the output of rank N goes to run_dir/logs/rank_N.log. When a rank fails the others are
    stopped, and all start again from the newest checkpoint, at most `launcher.restarts` times in all, and never where
    that would not help (`NOT_RETRIED`).

    Raises:
        ConfigError: what `launcher` sets up for ranks cannot be.
        RankError: a rank failed, and was not or not again started.
        LaunchError: run_dir cannot be written.
        Interrupted: a signal told this process to end; the ranks were stopped.
    """
    env.make_scratch(cfg.launcher)
    stop.listen(signals.WARNING)  # from here on it is for the ranks, those of a later start too
    budget = resolve.restarts(cfg.launcher, in_batch_job=False)
    first = restarts.existing_checkpoints(cfg)
    for attempt in range(budget + 1):
        try:
            _run(cfg, layout, entry)
            return
        except failures.RankError as error:
            if error.exit_code in NOT_RETRIED or attempt == budget:
                raise
            if restarts.saved_since(first):
                cfg = dataclasses.replace(cfg, resume="auto")
            print(f"warning: {error}; starting again, {attempt + 1} of {budget} times", file=sys.stderr, flush=True)


def _run(cfg: Config, layout: ParallelLayout, entry: str | None) -> None:
    config_path = job.save_config(cfg)
    logs = config_path.parent / "logs"
    logs.mkdir(exist_ok=True)
    world_size = layout.world_size
    # The launcher hosts the store, on a port that the system picks, so that no other process can take the port first.
    store = TCPStore(_HOST, 0, None, True, timedelta(seconds=cfg.launcher.timeout_s), wait_for_workers=False)
    threads = cfg.launcher.threads_per_rank or threads_for(world_size)
    infos = [RankInfo(i, world_size, i, world_size, _HOST, store.port, "local") for i in range(world_size)]
    args = [(str(config_path), entry or ENTRY, info) for info in infos]
    with tempfile.TemporaryDirectory(prefix="moe-") as errors:  # not in run_dir, which may be full
        setups = [_setup(info, cfg.launcher, logs, errors, threads) for info in infos]
        processes = RankProcesses(rank.train, args, setups, forked=cfg.runtime != "cuda")
        try:
            processes.run()
        finally:
            _restore_terminal()


def _setup(info: RankInfo, cfg: LauncherConfig, logs: Path, errors: str, threads: int) -> rank.Setup:
    environment = dict(os.environ) | info.environment() | env.variables(cfg, info)
    # torch then connects to the store that the launcher hosts, where rank 0 would start one of its own.
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if Path("/sys/class/net/lo").exists():
        # A host name that resolves to an unreachable address must not break a job that stays on this machine.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    log = logs / f"rank_{info.rank}.log"
    return rank.Setup(
        rank=info.rank,
        environment=environment,
        threads=threads,
        log=str(log),
        error_file=f"{errors}/rank_{info.rank}.json",
        own_terminal=info.rank == 0,
        cores=env.cores(cfg, info),
    )


def threads_for(ranks: int) -> int:
    """Compute threads of each of `ranks` ranks that share the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def _restore_terminal() -> None:
    # A rank that ends inside a live progress line leaves the cursor hidden.
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
