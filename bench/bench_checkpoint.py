"""How long training waits for a checkpoint that is written during training, against one that it waits for.

`make bench-checkpoint` trains a model of some hundred megabytes of weights and state on one rank and on two. In one run
it saves in turn while training waits, and during training, and measures how long the main thread of the first rank is
held, steps left out. It also says how much slower steps are while a checkpoint is written: here the writer takes its
time from the cores that train. It writes bench/results/checkpoint.json.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.bench_memory import MODELS
from bench.parity import COMMON
from bench.results import write
from bench.step_data import free_port
from launch import job
from moe_train.config.composition.compose import compose
from parallel.rank_info import RankInfo

LAYOUTS: dict[str, list[str]] = {"1 rank": [], "ep2": ["parallel.ep=2"]}
ROUNDS = 3
STEPS_BETWEEN = 3
WANTED_RATIO = 0.5
RUN = [
    *COMMON, *MODELS["mid-size mla"], "checkpoint.save_at_end=false", "train.steps=1000", "train.eval_batches=0",
    "batch.global_batch_size=2", "train.seq_length=64", "launcher.threads_per_rank=1", "checkpoint.keep_last=1",
]  # fmt: skip


def measure(layout: str) -> dict[str, Any]:
    """The row of a layout."""
    ranks = 2 if LAYOUTS[layout] else 1
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
        overrides = [*RUN, *LAYOUTS[layout], f"run_dir={directory}/run"]
        job.prepare_data(compose(overrides))
        Path(directory, "run").mkdir()
        context = multiprocessing.get_context("spawn")
        port = free_port()
        processes = [context.Process(target=_rank, args=(overrides, i, ranks, port, directory)) for i in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank of the benchmark failed; its own output says why")
        row: dict[str, Any] = json.loads(Path(directory, "row.json").read_text())
    return {"layout": layout, "ranks": ranks, **row}


def _rank(overrides: list[str], rank: int, ranks: int, port: int, directory: str) -> None:
    """One rank of a run that saves in turn in the two ways."""
    import torch

    from moe_train import train
    from moe_train.checkpoint import checkpoint
    from moe_train.data.datasets import build_datasets
    from moe_train.loop import step

    torch.set_num_threads(1)
    cfg = compose(overrides)
    run = train.prepare(cfg, RankInfo(rank, ranks, rank, ranks, "127.0.0.1", port, "torchrun"))
    data, _, _ = build_datasets(cfg, 1000 * cfg.batch.global_batch_size, 0, 0)
    batches = train.train_reader(run, data, 0).for_chunks(run.layout.vpp)
    times: dict[str, list[float]] = {name: [] for name in ("waiting", "blocked", "in_all", "quiet_step", "busy_step")}

    def steps(count: int, name: str) -> None:
        for _ in range(count):
            began = time.perf_counter()
            step.train_step(run, batches)
            times[name].append(time.perf_counter() - began)

    steps(2, "quiet_step")
    del times["quiet_step"][:]
    for _ in range(ROUNDS):
        steps(STEPS_BETWEEN, "quiet_step")
        began = time.perf_counter()
        checkpoint.save(run)
        times["waiting"].append(time.perf_counter() - began)
        steps(STEPS_BETWEEN, "quiet_step")
        began = time.perf_counter()
        saving = checkpoint.begin(run)
        blocked_s, done = time.perf_counter() - began, False
        while not done:
            steps(1, "busy_step")
            began = time.perf_counter()
            done = saving.advance()
            blocked_s += time.perf_counter() - began
        times["blocked"].append(blocked_s)
        times["in_all"].append(saving.seconds)
    if run.is_main:
        Path(directory, "row.json").write_text(json.dumps(_row(times, saving.job.bytes)))


def _row(times: dict[str, list[float]], size: int) -> dict[str, Any]:
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "megabytes": round(size / 1e6, 1),
        "held_waiting_s": round(middle["waiting"], 4),
        "blocked_s": round(middle["blocked"], 4),
        "blocked_ratio": round(middle["blocked"] / middle["waiting"], 3),
        "written_in_background_s": round(middle["in_all"], 3),
        "step_s": round(middle["quiet_step"], 4),
        "step_while_writing_ratio": round(middle["busy_step"] / middle["quiet_step"], 3),
    }


def main() -> None:
    """Command line of `make bench-checkpoint`. Exits with 1 where training waits too long."""
    rows = [measure(layout) for layout in LAYOUTS]
    table = Table(title="Training blocked by a checkpoint")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    worst = max(row["blocked_ratio"] for row in rows)
    path = write("checkpoint", {"blocked_ratio": worst, "wanted_at_most": WANTED_RATIO}, rows)
    print(f"training waits {worst:.0%} of the time that saving takes without a thread; {path}")
    sys.exit(worst > WANTED_RATIO)


if __name__ == "__main__":
    main()
