"""Predicted against measured step time of a small model over layouts of 1 to 4 ranks on this machine's CPU.

`make bench-plan` first measures what a cluster file would say: the speed of a matrix product and of a copy on one core,
latency and bandwidth of gloo, and how long the host takes for one kernel of a layer, from one run of one rank. Then it
times each layout and compares. It writes bench/results/plan.json.

Ranks share the cores of the machine: with more ranks than cores, a rank that waits in the pipeline leaves its core to
another. The prediction is therefore the longer of the simulated step and of all ranks' work over all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.parity import COMMON
from bench.results import write
from launch import forkserver, job, local
from moe_train.config.compose import compose
from moe_train.config.schema import Config
from moe_train.config.validate import validate
from moe_train.model.memory import job_of, weights_on
from parallel.planner.calibration import Calibration
from parallel.planner.hardware import MICRO, Hardware
from parallel.planner.layers import Machine
from parallel.planner.software import Software
from parallel.planner.time import plan_step
from parallel.rank_info import RankInfo
from tools.planning.rows import cluster
from tools.planning.validation import spearman

TOLERANCE, RANK_CORRELATION = 0.20, 0.9
STEPS = 8
LINKS = "links.json"
LAYOUTS: dict[str, list[str]] = {
    "1 rank": [],
    "1 rank, micro-batch 2": ["batch.micro_batch_size=2"],
    "dp2": ["parallel.dp=2"],
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "pp2 vpp2": ["parallel.pp=2", "parallel.vpp=2"],
    "ep2": ["parallel.ep=2"],
    "tp2 ep2 dp2": ["parallel.tp=2", "parallel.ep=2", "parallel.dp=2"],
    "pp2 ep2": ["parallel.pp=2", "parallel.ep=2"],
    "tp2 pp2": ["parallel.tp=2", "parallel.pp=2"],
}
RUN = [*COMMON, f"train.steps={STEPS}", "train.seq_length=128", "launcher.threads_per_rank=1"]


@dataclass(frozen=True)
class Measured:
    """What one core does, and gloo between ranks."""

    flops: float
    bytes_per_s: float
    latency_s: float
    link_bytes_per_s: float


def kernels() -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s of a copy, one thread, the best of a few windows."""
    import torch

    torch.set_num_threads(1)
    a, b, c = torch.rand(512, 256), torch.rand(256, 768), torch.rand(2**22)
    product, copied = [], []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        product.append((time.perf_counter() - start) / 4)
        start = time.perf_counter()
        c.clone()
        copied.append(time.perf_counter() - start)
    return 2 * 512 * 256 * 768 / min(product), 2 * 4 * 2**22 / min(copied)


def messages(cfg: Config, info: RankInfo) -> None:
    """Entry of a rank: seconds of a small all-gather and bytes/s of a large one, written to run_dir by rank 0."""
    import torch
    import torch.distributed as dist

    from parallel import runtime

    runtime.start("cpu", info, cfg.launcher.timeout_s)

    def best(size: int) -> float:
        own = torch.zeros(size)
        every = [torch.zeros(size) for _ in range(dist.get_world_size())]
        taken = []
        for _ in range(12):
            dist.barrier()
            start = time.perf_counter()
            dist.all_gather(every, own)
            taken.append(time.perf_counter() - start)
        return min(taken)

    small, large = best(2), best(2**19)
    if info.rank == 0:
        Path(cfg.run_dir, LINKS).write_text(json.dumps([small, 4 * 2**19 / max(1e-9, large - small)]))
    dist.barrier()


def calibrate() -> Measured:
    """Measure this machine."""
    flops, moved = kernels()
    with tempfile.TemporaryDirectory(prefix="plan-") as directory:
        cfg = compose([*RUN, "parallel.dp=2", f"run_dir={directory}/run"])
        local.start(cfg, validate(cfg), "bench.bench_plan:messages")
        latency, link = json.loads(Path(directory, "run", LINKS).read_text())
    return Measured(flops, moved, latency, link)


def hardware_of(measured: Measured) -> Hardware:
    """`conf/cluster/local_cpu.yaml` with what was measured."""
    latency = measured.latency_s / MICRO
    return replace(
        cluster("local_cpu"), fp32_tflops=measured.flops / 1e12, bf16_tflops=measured.flops / 1e12,
        fp8_tflops=measured.flops / 1e12, memory_tb_per_s=measured.bytes_per_s / 1e12,
        domain_gb_per_s=measured.link_bytes_per_s / 1e9, network_gb_per_s=measured.link_bytes_per_s / 1e9,
        domain_latency_us=latency, network_latency_us=latency,
    )  # fmt: skip


def timed(overrides: Sequence[str]) -> float:
    """Seconds of a step, median without the first two."""
    with tempfile.TemporaryDirectory(prefix="plan-") as directory:
        cfg = compose([*RUN, *overrides, f"run_dir={directory}/run"])
        layout = validate(cfg)
        job.prepare_data(cfg)
        local.start(cfg, layout)
        lines = [json.loads(line) for line in Path(directory, "run", "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["step_time_s"] for line in lines if "step_time_s" in line][2:])


def predicted(overrides: Sequence[str], hardware: Hardware, host_us: float) -> float:
    """Seconds of a step."""
    cfg = compose([*RUN, *overrides])
    layout = validate(cfg)
    planned = job_of(cfg, layout)
    # Nothing overlaps on a CPU, and nothing is fused away: the constants of GPUs do not hold.
    constants = Calibration(
        gemm_half_k=1, gemm_speed=1, weights_speed=1, quantize_passes=1, memory_passes=1, attention_speed=1,
        attention_half=1, attention_backward=2, tp_exposed=1, cp_exposed=1, dp_exposed=1, fsdp_exposed=1,
        all_to_all_exposed=1, pp_exposed=1, host_us=host_us, sync_us=0, flex_sync_us=0, step_s=0, straggler=0,
    )  # fmt: skip
    software = Software(dispatcher="alltoall", overlap_tp=False, overlap_dp=False, flash_attention=False)
    weights = [weights_on(cfg, planned, rank) for rank in range(layout.pp)]
    schedule = "interleaved" if layout.vpp > 1 else "1f1b"
    step = plan_step(planned, Machine(hardware, software, constants), schedule, weights)
    cores = os.cpu_count() or 1
    busy = sum(step.pipeline.busy) / layout.pp * layout.world_size / min(cores, layout.world_size)
    return max(step.pipeline.seconds, busy) + step.optimizer + step.data_parallel


def host_time(seconds: float, hardware: Hardware) -> float:
    """The host time of a kernel, microseconds, with which the first layout takes as long as it was measured to take."""
    low, high = 0.0, 10_000.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted([], hardware, middle) < seconds else (low, middle)
    return (low + high) / 2


def main() -> None:
    """Command line of `make bench-plan`. Exits with 1 if a prediction is outside the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only these layouts (repeat the option)")
    arguments = parser.parse_args()
    forkserver.begin()
    try:
        measured = calibrate()
        hardware = hardware_of(measured)
        seconds = {name: timed(LAYOUTS[name]) for name in ("1 rank", *(arguments.layout or list(LAYOUTS)[1:]))}
    finally:
        forkserver.kill()
    host = host_time(seconds["1 rank"], hardware)
    rows: list[dict[str, Any]] = []
    shown = Table(title=f"Step time, s; one kernel costs the host {host:.1f} us")
    for column in ("layout", "measured", "predicted", "error"):
        shown.add_column(column)
    for name, known in seconds.items():
        expected = predicted(LAYOUTS[name], hardware, host)
        rows.append({"layout": name, "measured_s": known, "predicted_s": expected, "error": expected / known - 1})
        shown.add_row(name, f"{known:.3f}", f"{expected:.3f}", f"{expected / known - 1:+.1%}")
    Console().print(shown)
    correlation = spearman([row["measured_s"] for row in rows], [row["predicted_s"] for row in rows])
    worst = max(abs(row["error"]) for row in rows)
    holds = worst <= TOLERANCE and correlation >= RANK_CORRELATION
    print(f"largest error {worst:.1%}, rank correlation {correlation:.2f}")
    if not arguments.layout:
        summary = {
            "all_hold": holds, "max_error": worst, "rank_correlation": correlation, "host_us": host,
            "calibration": {name: getattr(measured, name) for name in measured.__dataclass_fields__},
        }  # fmt: skip
        print(f"wrote {write('plan', summary, rows)}")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
