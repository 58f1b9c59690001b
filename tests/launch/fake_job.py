"""What ranks do in the tests of the launcher, in place of training."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from moe_train.config.schema import Config
from moe_train.resilience import stop
from moe_train.resilience.bad_steps import DivergedError
from moe_train.resilience.watch import ProgressMarker, Watch
from parallel.errors import ConfigError, DataError
from parallel.rank_info import RankInfo


def _meet(rank: RankInfo) -> None:
    method = f"tcp://{rank.master_addr}:{rank.master_port}"
    dist.init_process_group("gloo", init_method=method, rank=rank.rank, world_size=rank.world_size)
    dist.barrier()


def _say(cfg: Config, rank: RankInfo, name: str) -> None:
    """A file that a test can wait for."""
    part = Path(cfg.run_dir, f"part_{rank.rank}")
    part.write_text(str(os.getpid()))
    part.rename(Path(cfg.run_dir, f"{name}_{rank.rank}"))


def report(cfg: Config, rank: RankInfo) -> None:
    """Say who this rank is."""
    _meet(rank)
    total = torch.tensor(rank.rank)
    dist.all_reduce(total)
    print(f"output of rank {rank.rank}")
    print(f"warnings of rank {rank.rank}", file=sys.stderr)
    facts = {
        "sum": int(total),
        "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "launcher": rank.launcher,
        "seed": cfg.seed,
        "run_dir": cfg.run_dir,
        "local": [rank.local_rank, rank.local_world_size],
        "environment": [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]],
    }
    Path(cfg.run_dir, f"rank_{rank.rank}.json").write_text(json.dumps(facts))


def surroundings(cfg: Config, rank: RankInfo) -> None:
    """Say where this rank runs."""
    facts = {
        "cores": sorted(os.sched_getaffinity(0)),
        "variable": os.environ.get("MADE_UP"),
        "temporary": [os.environ.get("TMPDIR"), tempfile.gettempdir()],
    }
    Path(cfg.run_dir, f"rank_{rank.rank}.json").write_text(json.dumps(facts))


def fail_explained(cfg: Config, rank: RankInfo) -> None:
    """Rank 1 finds an error of the user's; the others lose it in a collective."""
    _meet(rank)
    if rank.rank == 1:
        raise DataError("the corpus is empty", "set data.path")
    dist.all_reduce(torch.ones(1))


def lack_a_package(cfg: Config, rank: RankInfo) -> None:
    """Rank 1 lacks a package; the others lose it in a collective."""
    _meet(rank)
    if rank.rank == 1:
        import gone  # type: ignore[import-not-found]  # noqa: F401
    dist.all_reduce(torch.ones(1))


def fail_unexplained(cfg: Config, rank: RankInfo) -> None:
    """Rank 0 has a bug; the others lose it in a collective."""
    _meet(rank)
    if rank.rank == 0:
        raise ValueError("a bug\nwith details")
    dist.all_reduce(torch.ones(1))


def fail_everywhere(cfg: Config, rank: RankInfo) -> None:
    """Every rank finds the same error."""
    _meet(rank)
    raise ConfigError("seed=0 is odd", "set seed=1")


def killed(cfg: Config, rank: RankInfo) -> None:
    """Rank 1 is killed, as by the kernel when memory is out; the others lose it in a collective."""
    _meet(rank)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def crash(cfg: Config, rank: RankInfo) -> None:
    """Rank 1 crashes in native code."""
    _meet(rank)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(torch.ones(1))


def hang(cfg: Config, rank: RankInfo) -> None:
    """Rank 0 waits in a collective for the others, which sleep."""
    _meet(rank)
    _say(cfg, rank, "hanging")
    if rank.rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(300)


def hang_stubbornly(cfg: Config, rank: RankInfo) -> None:
    """As `hang`, and a handler of SIGTERM is set, which cannot run while native code does not return."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    hang(cfg, rank)


def hang_alone(cfg: Config, rank: RankInfo) -> None:
    """Fail on rank 1 while the others do nothing but sleep."""
    _meet(rank)
    _say(cfg, rank, "hanging")
    if rank.rank == 1:
        raise RuntimeError("rank 1 had enough")
    time.sleep(300)


def until_told(cfg: Config, rank: RankInfo) -> None:
    """Stop together once a signal has asked any rank to."""
    _meet(rank)
    stop.listen(signal.SIGUSR1)
    _say(cfg, rank, "hanging")
    requested = torch.zeros(1)
    while not requested.item():
        time.sleep(0.05)
        requested = torch.tensor(float(bool(stop.requested_by())))
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
    raise stop.Stopped


def _attempt(cfg: Config, rank: RankInfo) -> int:
    """How often this rank was started before in this run directory. Leaves what it was told about resuming."""
    attempt = len(list(Path(cfg.run_dir).glob(f"attempt_*_{rank.rank}")))
    Path(cfg.run_dir, f"attempt_{attempt}_{rank.rank}").write_text(cfg.resume)
    return attempt


def killed_twice(cfg: Config, rank: RankInfo) -> None:
    """Rank 1 is killed in the first two starts, in the second after a checkpoint was written."""
    attempt = _attempt(cfg, rank)
    _meet(rank)
    if attempt == 1 and rank.rank == 0:
        checkpoint = Path(cfg.run_dir, "checkpoints", "step_00000001")
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
    dist.barrier()
    if attempt < 2 and rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def stopped_once(cfg: Config, rank: RankInfo) -> None:
    """Rank 1 is stopped (SIGSTOP) in the first start, while the others wait for it."""
    pulse = ProgressMarker()
    watched = Watch(pulse, Path(cfg.run_dir), rank.rank, rank.world_size, lambda: 1.0, lambda: False)
    watched.start()
    _meet(rank)
    pulse.mark(4, "update")
    if _attempt(cfg, rank) == 0 and rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))
    watched.stop()


def diverge(cfg: Config, rank: RankInfo) -> None:
    """Every rank finds that training is at an end."""
    _attempt(cfg, rank)
    _meet(rank)
    raise DivergedError("step 3 is bad", "see its data")


def report_late(cfg: Config, rank: RankInfo) -> None:
    """Rank 0 has more to do at the end than the others, which say whether it was done as they left."""
    _meet(rank)
    if rank.rank == 0:
        time.sleep(2)
        Path(cfg.run_dir, "report").touch()
    else:
        atexit.register(lambda: Path(cfg.run_dir, "left").write_text(str(Path(cfg.run_dir, "report").exists())))
