"""A rank that torchrun, srun or mpirun started: rendezvous, receive the config of rank 0, train.

Only rank 0 parses the command line: an error is printed once, and a default such as the time in run_dir is the same on
all ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch import env, failures, job, lock, rendezvous, restarts, room, streams
from launch.local import launcher, rank
from launch.slurm import commands
from moe_train.config.composition.fallback import fitting
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.resilience import stop
from parallel.errors import ConfigError, HardwareError, LaunchError, MoeTrainError
from parallel.rank_info import RankInfo

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_CONFIG, _FAILED, _LOST, _READ, _DONE, _CODE, _VERDICT, _LEFT, _END, _SRUN = (
    f"moe_train/{key}" for key in ("config", "failed", "lost", "read", "done", "code", "verdict", "left", "end", "srun")
)
_PREPARATION_S = 24 * 3600  # other ranks wait while rank 0 tokenises a corpus; if it dies they notice at once
_REPORT_S = 3600  # and while it reads all metrics of the run for its report


def run(info: RankInfo, entry: str | None = None) -> int:
    """Be rank `info` of a job that trains, or that runs `entry` without data. Returns the exit code of this process."""
    streams.tolerate()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
        # At once, also inside a collective; Python's own handler would wait for it. The launcher ends the other ranks.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            raise ConfigError(
                f"--multirun runs one job after another, and {info.launcher} has started the ranks of one",
                "run moe-train --multirun alone, or start one job for each value",
            )
        store = rendezvous.connect(info)
        if info.launcher.startswith("srun"):
            store.set(f"{_SRUN}/{info.rank}", rendezvous.component())
    except MoeTrainError as error:
        if info.rank == 0 or isinstance(error, LaunchError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return _run_coordinator(info, store, entry) if info.rank == 0 else _run_worker(info, store, entry)


def _run_coordinator(info: RankInfo, store: TCPStore, entry: str | None) -> int:
    from moe_train.checkpoint import continuing
    from moe_train.config.composition import compose

    published = False

    def work(requested: Config) -> None:
        nonlocal published
        _refuse_components(info, store)
        cfg = requested
        if cfg.runtime == "simulated":
            raise ConfigError(
                f"runtime=simulated is one process, and {info.launcher} started {info.world_size}",
                "run moe-train runtime=simulated alone",
            )
        if entry is None and (why := continuing.nothing_to_do(cfg)):
            print(why, flush=True)
            return
        cfg = fitting(cfg, info.world_size)
        with failures.packages():
            job.resolve_runtime(cfg)
            if entry is None:
                room.check(cfg, validate(cfg, info.world_size), range(info.local_world_size))
                commands.warn_unheard(cfg.launcher)
                job.prepare_data(cfg)
        if entry is None and stop.requested_by():  # while the data were made, which can take hours
            print(
                f"stopped by {stop.requested_by()} before the first step; the same command continues", file=sys.stderr
            )
            raise stop.Stopped
        with contextlib.nullcontext() if entry else lock.held(cfg, _exit_for_another_run):
            if entry is None:
                continuing.set_aside(cfg)
                # A later start begins with the layout that was asked for, not with the one that fits these ranks.
                job.save_config(dataclasses.replace(requested, runtime=cfg.runtime))
            restarts.remember(cfg)
            text = compose.to_yaml(cfg)
            store.set(_CONFIG, json.dumps({"config": text}))
            published = True
            _train_with(text, info, store, entry)

    words = [*sys.argv[1:], *restarts.overrides()]
    code = compose.hydra_entry(work, argv=words, revise=continuing.continued)
    if not published:  # a wrong config, or --cfg and --help: hydra_entry has said all there is to say
        store.set(_CONFIG, json.dumps({"exit": code}))
        _wait_for_count(store, _READ, info.world_size - 1)
    return code


def _refuse_components(info: RankInfo, store: TCPStore) -> None:
    """Raise LaunchError where ranks belong to different components of `srun A : B`.

    Before the config is looked at: their number may be one that no layout has.
    """
    if not info.launcher.startswith("srun"):
        return
    keys = [f"{_SRUN}/{rank_}" for rank_ in range(info.world_size)]
    try:
        store.wait(keys)
    except RuntimeError:  # some have not come, and what waits for them next says so
        return
    rendezvous.refuse_components([component.decode() for component in store.multi_get(keys)])


def _run_worker(info: RankInfo, store: TCPStore, entry: str | None) -> int:
    from datetime import timedelta

    try:
        store.wait([_CONFIG], timedelta(seconds=_PREPARATION_S))
        message: dict[str, Any] = json.loads(store.get(_CONFIG))
        store.add(_READ, 1)
    except RuntimeError:
        return 1  # rank 0 is gone, and has said why or been reported by the launcher
    if "exit" in message:
        return int(message["exit"])
    _train_with(message["config"], info, store, entry)
    return 0


def _train_with(text: str, info: RankInfo, store: TCPStore, entry: str | None) -> None:
    from moe_train.config.composition import compose

    with tempfile.TemporaryDirectory() as directory:  # run_dir need not be visible from this node yet
        path = Path(directory, "config.yaml")
        path.write_text(text, encoding="utf-8")
        _train(compose.from_yaml(path), path, info, store, entry)


def _train(cfg: Config, path: Path, info: RankInfo, store: TCPStore, entry: str | None) -> None:
    try:
        env.apply(cfg.launcher, info)
        rank.use_threads(cfg.launcher.threads_per_rank or cfg.launcher.cpus_per_rank or _threads(info))
        _compare(cfg, info, store, versions=entry is None)
        rank.train(str(path), entry or launcher.ENTRY, info)
    except SystemExit as ended:  # a requested stop
        _exit_barrier(info, store)
        _exit(ended.code if isinstance(ended.code, int) else 1)
    except Exception as error:
        _report_error(error, cfg, info, store)
        _exit(failures.exit_code_of(error))  # a broken communicator can keep a process, and the launcher waits
    _exit_barrier(info, store)


def _exit_barrier(info: RankInfo, store: TCPStore) -> None:
    """Exit barrier: ranks exit together, after rank 0 has written its report.

    A launcher kills the other ranks soon after the first has exited, or at once if its exit code is not 0.
    """
    from datetime import timedelta

    with contextlib.suppress(RuntimeError):  # the store ends with rank 0
        if info.rank == 0:
            _wait_for_count(store, _DONE, info.world_size - 1, timeout_s=60)
            store.set(_END, "")
            _wait_for_count(store, _LEFT, info.world_size - 1)  # else torch warns on ranks that got no answer
        else:
            store.add(_DONE, 1)
            store.wait([_END], timedelta(seconds=_REPORT_S))
            store.add(_LEFT, 1)


def _compare(cfg: Config, info: RankInfo, store: TCPStore, versions: bool) -> None:
    """Compare code, config and `versions` of all ranks, and which GPU each has, before a model is built. Where ranks
    differ rank 0 says which from most, and all processes end."""
    from launch.preflight import facts
    from moe_train.config.composition import compose

    mine: dict[str, Any] = {
        "node": facts.node_name(),
        "versions": {},
        "gpu": _only_gpu() if cfg.runtime == "cuda" else "",
    }
    if versions:
        config = hashlib.sha256(compose.to_yaml(cfg).encode()).hexdigest()[:12]
        mine["versions"] = facts.versions() | {"config": config}
    store.set(f"{_CODE}/{info.rank}", json.dumps(mine))
    if info.rank:
        store.wait([_VERDICT])
        verdict = json.loads(store.get(_VERDICT))
        if verdict:
            store.add(_LEFT, 1)
            _exit(verdict)
        return
    store.wait([f"{_CODE}/{i}" for i in range(info.world_size)])
    error = refusal([json.loads(store.get(f"{_CODE}/{i}")) for i in range(info.world_size)])
    if error:  # told before anyone ends, because a launcher may kill the others at the first that does
        _report_error(error, cfg, info, store)
    store.set(_VERDICT, json.dumps(error.exit_code if error else 0))
    if error:
        _wait_for_count(store, _LEFT, info.world_size - 1)
        _exit(error.exit_code)


def _only_gpu() -> str:
    """The GPU of a process that sees no other one; "" where it sees several."""
    import torch

    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.device_count() == 1 else ""


def refusal(records: Sequence[Mapping[str, Any]]) -> MoeTrainError | None:
    """Why ranks cannot train together, from the `node`, `versions` and `gpu` of each; None where they can."""
    if problem := odd_ranks(records):
        return HardwareError(problem, "give every node the same code and environment")
    first: dict[tuple[str, str], int] = {}
    for rank_, record in enumerate(records):
        other = first.setdefault((record["node"], record["gpu"]), rank_)
        if record["gpu"] and other != rank_:
            return ConfigError(
                f"ranks {other} and {rank_} on {record['node']} see one GPU, the same",
                "start one rank for each GPU: srun --gpus-per-task=1, or --gpus-per-node=N with --ntasks-per-node=N",
            )
    return None


def _exit_for_another_run(why: str) -> NoReturn:
    """At once: a signal would have the ranks save over what the other run has there."""
    print(f"error: {why}; this run ends, so that not two write there", file=sys.stderr, flush=True)
    os._exit(LaunchError.exit_code)


def _exit(code: int) -> NoReturn:
    lock.release_all()
    failures.leave_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def odd_ranks(records: Sequence[Mapping[str, Any]]) -> str:
    """What differs on which ranks, each of `records` with its `node` and `versions`; "" where nothing does."""
    problems = []
    for name in records[0]["versions"]:
        values = [record["versions"].get(name) for record in records]
        usual = Counter(values).most_common(1)[0][0]
        odd = [f"rank {i} ({records[i]['node']}) has {value}" for i, value in enumerate(values) if value != usual]
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            problems.append(f"{name}: {', '.join(odd[:3])}{more}, the others {usual}")
    return "; ".join(problems)


def _threads(info: RankInfo) -> int:
    """Under Slurm the cores of a process may already be those of its task alone."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or 0) or launcher.threads_for(info.local_world_size)


def _report_error(error: Exception, cfg: Config, info: RankInfo, store: TCPStore) -> None:
    """Print `error` in one line, unless it only says that a rank is gone whose own error was printed."""
    lost = failures.lost_peer(error)
    try:
        if lost and (store.check([_FAILED]) or store.add(_LOST, 1) > 1):
            return
        if not lost:
            store.set(_FAILED, str(info.rank))
    except RuntimeError:
        if lost:
            return  # the store went with rank 0
    if cfg.verbose:
        traceback.print_exception(error)
    hint = (
        "" if cfg.verbose or isinstance(error, MoeTrainError | ImportError) else " (verbose=true shows the traceback)"
    )
    print(f"error: rank {info.rank}: {failures.one_line(error)}{hint}", file=sys.stderr)


def _wait_for_count(store: TCPStore, key: str, count: int, timeout_s: float = 10) -> None:
    """Wait until `key` has been counted up to `count`, but not for long: this is a courtesy to the other ranks."""
    deadline = time.monotonic() + timeout_s
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.02)
