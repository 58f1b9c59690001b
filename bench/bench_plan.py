"""Predicted against measured step time of a small model over layouts of 1 to 4 ranks on this machine's CPU.

`make bench-plan` measures what a cluster file would say: the speed of a GEMM and of a copy on one core, and
latency and bandwidth of gloo between ranks that compute between their messages, as those of a run do. How long the host
takes for one kernel of a layer comes from one run of one rank. It times each layout in the same rounds, so that other
processes of the machine slow both alike, and takes medians. It writes bench/results/plan.json.

Ranks share the cores of the machine, so all is measured with as many ranks at work as the layout has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.parity import COMMON
from bench.results import write
from launch import job
from launch.local import forkserver, launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.model.memory import weights_of, workload_of
from parallel.planner.calibration import Calibration
from parallel.planner.estimate import estimate
from parallel.planner.hardware import MICRO, Hardware
from parallel.planner.software import Software
from parallel.rank_info import RankInfo
from tools.published.clusters import hardware_of as hardware_named
from tools.published.ranking import spearman

TOLERANCE, RANK_CORRELATION = 0.20, 0.9
STEPS, WARM_UP, ROUNDS, LOADS = 8, 2, 2, 2
TOKENS, HIDDEN, INNER = 128, 256, 768  # of the model: products and copies are measured at its own sizes
WEIGHTS = 2**24  # about as many as the model has, which no cache holds
LARGE = 2**22  # numbers of a rank's part of a large message
LOAD = "load.json"
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
RUN = [*COMMON, f"train.steps={STEPS}", f"train.seq_length={TOKENS}", "launcher.threads_per_rank=1"]


@dataclass(frozen=True)
class Measured:
    """What each of so many ranks does while the others do the same: FLOP/s of a product, bytes/s of a copy, seconds of
    an operation with hardly any work, latency and bandwidth of gloo between neighbours."""

    flops: dict[int, float]
    bytes_per_s: dict[int, float]
    operation_s: dict[int, float]
    latency_s: dict[int, float]
    link_bytes_per_s: dict[int, float]


def load(cfg: Config, info: RankInfo) -> None:
    """Entry of a rank: times products, copies, operations and messages; rank 0 writes the means of all to run_dir."""
    import torch
    import torch.distributed as dist

    from parallel import runtime

    runtime.start("cpu", info, cfg.launcher.timeout_s)
    ranks = dist.get_world_size()
    a, b = torch.rand(TOKENS, HIDDEN), torch.rand(HIDDEN, INNER)
    out, tiny = torch.empty(TOKENS, INNER), torch.rand(16, requires_grad=True)
    weights = torch.rand(WEIGHTS)
    neighbours = dist.new_subgroups(2)[0] if ranks > 1 else None

    def mean_s(work: Callable[[], object], count: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(count):
            work()
        return (time.perf_counter() - start) / count

    product = mean_s(lambda: torch.mm(a, b, out=out), 1000)
    copied = mean_s(weights.clone, 20)
    operation = mean_s(lambda: tiny * tiny, 40000)

    def message_s(size: int, count: int) -> float:
        """A gather and a scatter on average, beyond the product before each, so that ranks have to be woken."""
        shard, gathered = torch.zeros(size), torch.zeros(size * 2)

        def work() -> None:
            torch.mm(a, b, out=out)
            dist.all_gather_into_tensor(gathered, shard, group=neighbours)
            torch.mm(a, b, out=out)
            dist.reduce_scatter_tensor(shard, gathered, group=neighbours)

        return mean_s(work, count) / 2 - product

    small, large = (message_s(2, 300), message_s(LARGE, 10)) if ranks > 1 else (0.0, 1.0)
    sum_over_ranks = torch.tensor([product, copied, operation, small, large])
    dist.all_reduce(sum_over_ranks)
    if info.rank == 0:
        Path(cfg.run_dir, LOAD).write_text(json.dumps((sum_over_ranks / ranks).tolist()))
    dist.barrier()


def loaded(ranks: int) -> tuple[float, ...]:
    """The numbers of `Measured` for so many ranks."""
    with tempfile.TemporaryDirectory(prefix="plan-") as directory:
        cfg = compose([*RUN, f"parallel.dp={ranks}", f"run_dir={directory}/run"])
        launcher.start(cfg, validate(cfg), "bench.bench_plan:load")
        product, copied, operation, small, large = json.loads(Path(directory, "run", LOAD).read_text())
    rate = 4 * LARGE / max(1e-9, large - small)
    return 2 * TOKENS * HIDDEN * INNER / product, 2 * 4 * WEIGHTS / copied, operation, small, rate


def hardware_of(measured: Measured, ranks: int) -> Hardware:
    """`conf/cluster/local_cpu.yaml` with what was measured."""
    # More ranks than cores find a core awake in `load`; those of a run block in collectives, and it sleeps meanwhile.
    latency, rate = measured.latency_s[2] / MICRO, measured.link_bytes_per_s[2] / 1e9
    tflops = measured.flops[ranks] / 1e12
    return replace(
        hardware_named("local_cpu"), fp32_tflops=tflops, bf16_tflops=tflops, fp8_tflops=tflops,
        memory_tb_per_s=measured.bytes_per_s[ranks] / 1e12, domain_gb_per_s=rate,
        network_gb_per_s=rate, domain_latency_us=latency, network_latency_us=latency,
    )  # fmt: skip


def timed(overrides: Sequence[str]) -> list[float]:
    """Seconds of each step, without the first ones."""
    with tempfile.TemporaryDirectory(prefix="plan-") as directory:
        cfg = compose([*RUN, *overrides, f"run_dir={directory}/run"])
        layout = validate(cfg)
        job.prepare_data(cfg)
        launcher.start(cfg, layout)
        lines = [json.loads(line) for line in Path(directory, "run", "metrics.jsonl").read_text().splitlines()]
    return [line["step_time_s"] for line in lines if "step_time_s" in line][WARM_UP:]


def measure(names: Sequence[str]) -> tuple[Measured, dict[str, float]]:
    """The machine, and seconds of a step of each layout: medians over all rounds."""
    loads: dict[int, list[tuple[float, ...]]] = {1: [], 2: [], 4: []}
    steps: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for ranks, values in loads.items():
            values += [loaded(ranks) for _ in range(LOADS)]
        for name in names:
            steps[name] += timed(LAYOUTS[name])
    medians = [
        {ranks: statistics.median(load[which] for load in values) for ranks, values in loads.items()}
        for which in range(5)
    ]
    for speeds in medians[:2]:  # of products and copies: what many ranks reach at once, fewer reach as well
        for ranks in sorted(speeds):
            speeds[ranks] = max(value for others, value in speeds.items() if others >= ranks)
    return Measured(*medians), {name: statistics.median(seconds) for name, seconds in steps.items()}


def predicted(overrides: Sequence[str], measured: Measured, host_us: float) -> float:
    """Seconds of a step."""
    cfg = compose([*RUN, *overrides])
    layout = validate(cfg)
    ranks = layout.world_size
    planned, hardware = workload_of(cfg, layout), hardware_of(measured, ranks)
    host_us *= measured.operation_s[ranks] / measured.operation_s[1]
    # Nothing overlaps on a CPU, and nothing is fused away: the constants of GPUs do not hold.
    constants = Calibration(
        gemm_half_k=1, gemm_speed=1, weights_speed=1, quantize_passes=1, memory_passes=1, attention_speed=1,
        tp_exposed=1, dp_exposed=1, fsdp_exposed=1, pass_us=0,
        all_to_all_exposed=1, pp_exposed=1, host_us=host_us, sync_us=0, flex_sync_us=0, host_blend=1, sync_blend=1,
        grouped_kernel=1, scores_passes=1, expert_passes_2026=1, step_s=0, straggler=0,
    )  # fmt: skip
    software = Software(dispatcher="alltoall", overlap_tp=False, overlap_dp=False, flash_attention=False)
    weights = weights_of(cfg.model, planned)
    return estimate(planned, hardware, software, weights, constants=constants).step.seconds


def host_time(seconds: float, measured: Measured) -> float:
    """The host time of a kernel, microseconds, with which the first layout takes its measured time."""
    low, high = 0.0, 10_000.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted([], measured, middle) < seconds else (low, middle)
    return (low + high) / 2


def main() -> None:
    """Command line of `make bench-plan`. Exits with 1 if a prediction is outside the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only these layouts (repeat the option)")
    arguments = parser.parse_args()
    forkserver.begin()
    try:
        measured, seconds = measure(("1 rank", *(arguments.layout or list(LAYOUTS)[1:])))
    finally:
        forkserver.kill()
    host = host_time(seconds["1 rank"], measured)
    rows: list[dict[str, Any]] = []
    shown = Table(title=f"Step time, s; one kernel costs the host {host:.1f} us")
    for column in ("layout", "measured", "predicted", "error"):
        shown.add_column(column)
    for name, known in seconds.items():
        expected = predicted(LAYOUTS[name], measured, host)
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
