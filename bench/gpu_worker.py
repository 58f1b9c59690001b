"""What the processes of `make gpu-check` do: each is the only rank of a run, and reports numbers part by part.

Everything goes through `moe_train.train.prepare` and the loop of a run. The process ends at the first error, so that
nothing runs on a device in an unknown state.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import CLUSTERS, PEAK_MEMORY, STEP_TIME
from bench.gpu_task import Task
from bench.gpu_tensors import compare, gradients_of
from bench.losses import differences
from bench.step_data import free_port
from launch import job
from moe_train import train
from moe_train.checkpoint import checkpoint
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.data.datasets import build_datasets
from moe_train.loop.callbacks.profiler import PARTS
from moe_train.loop.step import train_step
from moe_train.model import backend
from moe_train.model.estimate import estimate_run
from moe_train.model.memory import predict, workload_of
from moe_train.run import Metrics, Run
from moe_train.telemetry import peak
from moe_train.telemetry.throughput import speed
from parallel import groups
from parallel.errors import HardwareError
from parallel.planner.memory import saved_per_micro_batch
from parallel.rank_info import RankInfo
from tools.published.clusters import cluster_config

LOSSES = ("lm_loss", "mtp_loss", "seq_load_balancing_loss")
STEPS = 3  # with the reference, and before and after a checkpoint
TIMED_WARM_UP = 4  # steps of the large model that are not timed
GEMM_SIZE, GEMMS, GEMM_WINDOWS = 8192, 10, 5
LIBRARIES = {"Transformer Engine": "transformer_engine", "apex": "apex", "DeepEP": "deep_ep"}
MODULES = {"transformer_engine": "transformer_engine.pytorch", "apex": "apex.normalization", "deep_ep": "deep_ep"}
# Transformer Engine's own answer, which also looks at the version of CUDA.
TE_ANSWERS = {
    "block": "is_fp8_block_scaling_available", "tensor": "is_fp8_available", "delayed": "is_fp8_available",
    "mxfp8": "is_mxfp8_available", "nvfp4": "is_nvfp4_available",
}  # fmt: skip


def probe(task: Task) -> None:
    """Report the GPU and what is installed."""
    gpu = torch.cuda.get_device_properties(0)
    task.report(
        device=gpu.name,
        capability=[gpu.major, gpu.minor],
        memory_bytes=gpu.total_memory,
        cuda=torch.version.cuda,
        **installed(),
    )


def installed() -> dict[str, Any]:
    """Version, or why it cannot be imported, of each library that GPUs can use."""
    libraries: dict[str, Any] = {}
    for name, distribution in LIBRARIES.items():
        try:
            entry: dict[str, Any] = {"version": _version_of(distribution)}
            importlib.import_module(MODULES[distribution])
        except PackageNotFoundError:
            entry = {"version": None}
        except Exception as error:  # a half-installed extension raises RuntimeError or OSError, not ImportError
            entry["error"] = f"{type(error).__name__}: {error}"
        libraries[name] = entry
    return {"libraries": libraries}


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return version(distribution.replace("_", "-"))


def data(task: Task) -> None:
    """Tokenise the corpus."""
    job.prepare_data(task.config())


def reference(task: Task) -> None:
    """On the CPU: save the initial weights, and losses and gradients of the first steps."""
    run = start(task.config())
    path = checkpoint.save(run)
    losses, gradients = steps(run, STEPS)
    torch.save({"checkpoint": str(path), "losses": losses, "gradients": gradients}, task.kept(task.name))


def gradients(task: Task) -> None:
    """Compare losses and gradients with the reference, from its weights."""
    expected = torch.load(task.kept(task.options["reference"]), weights_only=True)
    run = start(task.config(f"init_from={expected['checkpoint']}"))
    losses, computed = steps(run, STEPS)
    task.report(
        loss_difference=largest_difference(losses, expected["losses"]),
        first_loss=losses[0]["lm_loss"],
        reference_first_loss=expected["losses"][0]["lm_loss"],
        **compare(computed, expected["gradients"]),
    )


def save(task: Task) -> None:
    """Train, save a checkpoint, and train on."""
    run = start(task.config())
    steps(run, STEPS)
    path = checkpoint.save(run)
    losses, _ = steps(run, STEPS)
    torch.save({"checkpoint": str(path), "losses": losses}, task.kept(task.name))


def resume(task: Task) -> None:
    """Continue a checkpoint and compare with the later steps of the run that wrote it."""
    expected = torch.load(task.kept(task.options["saved"]), weights_only=True)
    run = start(task.config(f"resume={expected['checkpoint']}"))
    losses, _ = steps(run, STEPS)
    task.report(loss_difference=largest_difference(losses, expected["losses"]), from_step=run.state.step - STEPS)


def recompute(task: Task) -> None:
    """Compare gradients of a step with each recomputation set and offload with those without; say what noise is."""
    losses, expected = steps(start(task.config()), 1)
    _, again = steps(start(task.config()), 1)
    noise = compare(again, expected)["gradient_difference"]
    for part in task.parts:
        cfg = task.config(*task.options["sets"][part])
        now, recomputed = steps(start(cfg), 1)
        identical = all(torch.equal(recomputed[name], expected[name]) for name in expected)
        task.report(
            part, loss_difference=largest_difference(now, losses), noise=noise, bit_identical=identical,
            **compare(recomputed, expected),
        )  # fmt: skip


def baseline(task: Task) -> None:
    """Save the losses of a run in bf16."""
    torch.save([line["lm_loss"] for line in trained(task.config())], task.kept(task.name))


def recipe(task: Task) -> None:
    """Compare smoothed losses of a run in another precision with those of bf16."""
    cfg = task.config()
    if reason := lacks(cfg):
        task.report(not_supported=reason)
        return
    expected = torch.load(task.kept(task.options["baseline"]), weights_only=True)
    lines = trained(cfg)
    apart = differences([line["lm_loss"] for line in lines], expected, task.options["warm_up"])
    task.report(
        largest_difference=worst(apart), last_difference=apart[-1], steps=len(lines),
        skipped_steps=sum(bool(line.get("skipped")) for line in lines), last_loss=lines[-1]["lm_loss"],
    )  # fmt: skip


def lacks(cfg: Config) -> str:
    """Why this GPU, or its software, does not have the FP8 or FP4 recipe of `cfg`; empty where it does."""
    name = cfg.precision.fp8 or cfg.precision.fp4
    if name is None or cfg.runtime != "cuda":
        return ""
    try:
        backend.choose(cfg, cfg.runtime)
    except HardwareError as error:
        return error.cause
    ask = getattr(importlib.import_module("transformer_engine.pytorch"), TE_ANSWERS[name], None)
    available, reason = ask(return_reason=True) if ask is not None else (True, "")
    return "" if available else f"Transformer Engine: {reason}"


def large(task: Task) -> None:
    """Time steps of the large model and take its peak memory, each next to its prediction."""
    cfg = task.config()
    layout = validate(cfg)
    needed = predict(cfg, layout)[0].total
    if cfg.runtime == "cuda":
        usable = torch.cuda.get_device_properties(0).total_memory
        if needed > usable:
            for part in task.parts:
                task.report(part, not_supported=f"needs {needed / 2**30:.0f} GiB of the {usable / 2**30:.0f} there are")
            return
        device_name = torch.cuda.get_device_name(0)
    else:
        cfg.telemetry.profile_memory_steps = 1
        device_name = "CPU"
    lines = trained(cfg)
    if STEP_TIME in task.parts:
        task.report(STEP_TIME, **step_time(cfg, lines, device_name))
    if PEAK_MEMORY in task.parts:
        measured, predicted = memory(cfg, lines)
        task.report(
            PEAK_MEMORY, measured_bytes=measured, predicted_bytes=predicted, prediction_error=predicted / measured - 1
        )


def step_time(cfg: Config, lines: Sequence[Metrics], device_name: str) -> dict[str, Any]:
    """Median step time, what it means, the GEMM peak, and the planner's prediction or why there is none."""
    if not all(math.isfinite(line["lm_loss"]) for line in lines):
        raise RuntimeError("a loss of the large model is not finite")
    seconds = statistics.median(line["step_time_s"] for line in lines[TIMED_WARM_UP:])
    gemm = gemm_tflops(cfg.runtime)
    reached = speed(cfg, 1, seconds, gemm)
    measured: dict[str, Any] = {
        "step_time_s": seconds, "tokens_per_s": reached.tokens_per_s, "tflops": reached.tflops_per_rank,
        "mfu": lines[-1]["mfu"], "gemm_tflops": gemm, "of_gemm_peak": reached.mfu,
    }  # fmt: skip
    name = CLUSTERS.get(device_name)
    if name is None:
        return {**measured, "predicted_s": None, "prediction": f"no file in conf/cluster describes {device_name!r}"}
    predicted = predicted_step_s(cfg, name)
    return {**measured, "predicted_s": predicted, "prediction_error": predicted / seconds - 1, "cluster": name}


def predicted_step_s(cfg: Config, cluster_name: str) -> float:
    """Seconds of a step of `cfg` on one GPU of a cluster, by the planner."""
    planned = dataclasses.replace(cfg, cluster=cluster_config(cluster_name))
    return estimate_run(planned, validate(planned)).step.seconds


def memory(cfg: Config, lines: Sequence[Metrics]) -> tuple[float, float]:
    """Peak memory as torch's allocator counted it, and its prediction, bytes.

    A CPU has no such count: there the parts that the profiler measures are added up.
    """
    layout = validate(cfg)
    stage = predict(cfg, layout)[0]
    if cfg.runtime == "cuda":
        return max(line["memory_peak_bytes"] for line in lines), stage.total
    activations = saved_per_micro_batch(workload_of(cfg, layout), 0)
    return sum(lines[0][part][0] for part in PARTS), activations + stage.parameters + stage.gradients + stage.optimizer


def gemm_tflops(runtime: str) -> float:
    """The best TFLOPS of a large square GEMM in bf16, over some windows."""
    if runtime != "cuda":
        return peak.measure_cpu(torch.bfloat16)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    torch.mm(a, b)
    best = math.inf
    for _ in range(GEMM_WINDOWS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(GEMMS):
            torch.mm(a, b)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / GEMMS)
    return 2 * GEMM_SIZE**3 / best / 1e12


def start(cfg: Config) -> Run:
    """The run of `cfg` with this process as its only rank, after its checkpoint was read. Earlier ones are over."""
    groups.destroy()
    validate(cfg)
    run = train.prepare(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", free_port(), "local"))
    checkpoint.resume(run)
    return run


def steps(run: Run, count: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of the next steps, and the gradients of the first of them."""
    samples = (run.state.step + count) * run.cfg.batch.global_batch_size
    dataset, _, _ = build_datasets(run.cfg, samples, 0, 0)
    batches = train.train_reader(run, dataset, run.state.consumed_samples).for_chunks(run.layout.vpp)
    losses: list[dict[str, float]] = []
    first: dict[str, Tensor] = {}
    for _ in range(count):
        metrics = train_step(run, batches)
        losses.append({name: metrics[name] for name in LOSSES if name in metrics})
        first = first or gradients_of(run)
    return losses, first


def trained(cfg: Config) -> list[Metrics]:
    """Lines of metrics.jsonl of a whole run of `cfg`, one for each step."""
    validate(cfg)
    train.run(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", free_port(), "local"))
    lines = map(json.loads, Path(cfg.run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "lm_loss" in line]


def largest_difference(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> float:
    """Largest relative difference of any loss of any step."""
    pairs = zip(ours, theirs, strict=True)
    return worst([(a[name] - b[name]) / b[name] for a, b in pairs for name in b])


def worst(numbers: Sequence[float]) -> float:
    """The largest magnitude; NaN where there is one."""
    return max(map(abs, numbers), key=lambda number: (math.isnan(number), number))
