"""A process that torchrun, srun or mpirun started: it meets the others, takes rank 0's config and trains.

Only rank 0 reads the command line, so a wrong one is explained once, and a default such as the time in run_dir is one
value for all ranks.
"""

from __future__ import annotations

import contextlib
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

from launch import env, failures, job, local, rank, rendezvous, restarts, slurm
from moe_train.config.fallback import fitting
from moe_train.config.schema import Config
from parallel.errors import ConfigError, LaunchError, MoeTrainError
from parallel.rank_info import RankInfo

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_CONFIG, _FAILED, _LOST, _READ, _DONE, _CODE, _VERDICT, _LEFT, _END = (
    f"moe_train/{key}" for key in ("config", "failed", "lost", "read", "done", "code", "verdict", "left", "end")
)
_PREPARATION_S = 24 * 3600  # other ranks wait while rank 0 tokenises a corpus; if it dies they notice at once
_REPORT_S = 3600  # and while it reads all metrics of the run for its report


def run(info: RankInfo, entry: str | None = None) -> int:
    """Be rank `info` of a job that trains, or that runs `entry` without data. Returns the exit code of this process."""
    # At once, also inside a collective; Python's own handler would wait for it. The launcher ends the other ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            raise ConfigError(
                f"--multirun runs one job after another, and {info.launcher} has started the ranks of one",
                "run moe-train --multirun alone, or start one job for each value",
            )
        store = rendezvous.meet(info)
    except MoeTrainError as error:
        if info.rank == 0 or isinstance(error, LaunchError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return _lead(info, store, entry) if info.rank == 0 else _follow(info, store, entry)


def _lead(info: RankInfo, store: TCPStore, entry: str | None) -> int:
    from moe_train.config import compose

    published = False

    def work(cfg: Config) -> None:
        nonlocal published
        if cfg.runtime == "simulated":
            raise ConfigError(
                f"runtime=simulated is one process, and {info.launcher} started {info.world_size}",
                "run moe-train runtime=simulated alone",
            )
        cfg = fitting(cfg, info.world_size)
        job.resolve_runtime(cfg)
        if entry is None:
            slurm.warn_unheard(cfg.launcher)
            job.prepare_data(cfg)
        path = job.save_config(cfg)
        restarts.remember(cfg)
        store.set(_CONFIG, json.dumps({"config": compose.to_yaml(cfg)}))
        published = True
        _train(cfg, path, info, store, entry)

    code = compose.hydra_entry(work, argv=[*sys.argv[1:], *restarts.overrides()])
    if not published:  # a wrong config, or --cfg and --help: hydra_entry has said all there is to say
        store.set(_CONFIG, json.dumps({"exit": code}))
        _await(store, _READ, info.world_size - 1)
    return code


def _follow(info: RankInfo, store: TCPStore, entry: str | None) -> int:
    from datetime import timedelta

    from moe_train.config import compose

    try:
        store.wait([_CONFIG], timedelta(seconds=_PREPARATION_S))
        message: dict[str, Any] = json.loads(store.get(_CONFIG))
        store.add(_READ, 1)
    except RuntimeError:
        return 1  # rank 0 is gone, and has said why or been reported by the launcher
    if "exit" in message:
        return int(message["exit"])
    with tempfile.TemporaryDirectory() as directory:  # run_dir need not be visible from this node yet
        path = Path(directory, "config.yaml")
        path.write_text(message["config"], encoding="utf-8")
        cfg = compose.from_yaml(path)
        _train(cfg, path, info, store, entry)
    return 0


def _train(cfg: Config, path: Path, info: RankInfo, store: TCPStore, entry: str | None) -> None:
    try:
        env.apply(cfg.launcher, info)
        rank.use_threads(cfg.launcher.threads_per_rank or cfg.launcher.cpus_per_rank or _threads(info))
        if entry is None:
            _same_everywhere(cfg, info, store)
        rank.train(str(path), entry or local.ENTRY, info)
    except SystemExit as ended:  # early, as asked
        _part(info, store)
        _leave(ended.code if isinstance(ended.code, int) else 1)
    except Exception as error:
        _tell(error, cfg, info, store)
        _leave(failures.exit_code_of(error))  # a broken communicator can keep a process, and the launcher waits
    _part(info, store)


def _part(info: RankInfo, store: TCPStore) -> None:
    """Leave together: soon after the first has left, or at once where its exit code is not 0, a launcher ends those
    that are not done, and rank 0 has a report to write."""
    from datetime import timedelta

    with contextlib.suppress(RuntimeError):  # the store ends with rank 0
        if info.rank == 0:
            _await(store, _DONE, info.world_size - 1, timeout_s=60)
            store.set(_END, "")
            _await(store, _LEFT, info.world_size - 1)  # or torch complains in each rank that did not get the answer
        else:
            store.add(_DONE, 1)
            store.wait([_END], timedelta(seconds=_REPORT_S))
            store.add(_LEFT, 1)


def _same_everywhere(cfg: Config, info: RankInfo, store: TCPStore) -> None:
    """Compare code, config and versions of all ranks before a model is built. Where they differ rank 0 says which
    ranks differ from most, and all processes end."""
    from launch.preflight import facts
    from moe_train.config import compose

    mine = facts.versions() | {"config": hashlib.sha256(compose.to_yaml(cfg).encode()).hexdigest()[:12]}
    store.set(f"{_CODE}/{info.rank}", json.dumps({"node": facts.node_name(), "versions": mine}))
    if info.rank:
        store.wait([_VERDICT])
        if store.get(_VERDICT) != b"same":
            store.add(_LEFT, 1)
            _leave(LaunchError.exit_code)
        return
    store.wait([f"{_CODE}/{i}" for i in range(info.world_size)])
    problem = odd_ranks([json.loads(store.get(f"{_CODE}/{i}")) for i in range(info.world_size)])
    if problem:  # told before anyone ends, because a launcher may kill the others at the first that does
        _tell(LaunchError(problem, "give every node the same code and environment"), cfg, info, store)
    store.set(_VERDICT, "different" if problem else "same")
    if problem:
        _await(store, _LEFT, info.world_size - 1)
        _leave(LaunchError.exit_code)


def _leave(code: int) -> NoReturn:
    failures.leave_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def odd_ranks(found: Sequence[Mapping[str, Any]]) -> str:
    """What differs on which ranks, each of `found` with its `node` and `versions`; "" where nothing does."""
    problems = []
    for name in found[0]["versions"]:
        values = [one["versions"].get(name) for one in found]
        usual = Counter(values).most_common(1)[0][0]
        odd = [f"rank {i} ({found[i]['node']}) has {value}" for i, value in enumerate(values) if value != usual]
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            problems.append(f"{name}: {', '.join(odd[:3])}{more}, the others {usual}")
    return "; ".join(problems)


def _threads(info: RankInfo) -> int:
    """Under Slurm the cores of a process may already be those of its task alone."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or 0) or local.threads_for(info.local_world_size)


def _tell(error: Exception, cfg: Config, info: RankInfo, store: TCPStore) -> None:
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
    hint = "" if cfg.verbose or isinstance(error, MoeTrainError) else " (verbose=true shows the traceback)"
    print(f"error: rank {info.rank}: {failures.one_line(error)}{hint}", file=sys.stderr)


def _await(store: TCPStore, key: str, count: int, timeout_s: float = 10) -> None:
    """Wait until `key` has been counted up to `count`, but not for long: this is a courtesy to the other ranks."""
    deadline = time.monotonic() + timeout_s
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.02)
