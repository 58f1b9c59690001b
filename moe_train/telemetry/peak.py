"""Peak speed of one rank, the denominator of MFU: from the config, from the GPU's data sheet, or measured on a CPU."""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist

from moe_train.model.kernels.gemm import matmul
from moe_train.model.precision import DTYPES
from moe_train.run import Run

log = logging.getLogger(__name__)

# Dense BF16 TFLOPS of NVIDIA's data sheets, by the name that the driver reports. Names are matched whole: the PCIe and
# NVL forms of a GPU are slower than its SXM form.
GPU_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H800": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA B200": 2250.0,
}

_GEMM_SIZE = 768
_WINDOWS, _WINDOW_S = 8, 0.03


def tflops_of_rank(run: Run) -> float | None:
    """Peak TFLOPS of one rank; None for a GPU that is not in the table, with a log line. Call it on every rank."""
    if run.cfg.telemetry.peak_tflops is not None:
        return run.cfg.telemetry.peak_tflops
    if run.device.type == "cpu":
        return measure_cpu(DTYPES[run.cfg.precision.dtype])
    name = torch.cuda.get_device_name(run.device)
    if name not in GPU_TFLOPS and run.is_main:
        log.warning("no peak is known for %r: mfu is null; set telemetry.peak_tflops to its dense BF16 TFLOPS", name)
    return GPU_TFLOPS.get(name)


def measure_cpu(dtype: torch.dtype) -> float:
    """TFLOPS of a square GEMM in `dtype` on the slowest rank, all at once because they share the cores.

    The best of a few short windows, each long enough for ranks that take turns on a core: another process may disturb
    some of them.
    """
    a, b = (torch.rand(_GEMM_SIZE, _GEMM_SIZE, dtype=torch.float32).to(dtype) for _ in range(2))
    matmul(a, b)  # the first call creates threads and code
    dist.barrier()
    best = max(_gemms_per_s(a, b) for _ in range(_WINDOWS))
    rate = torch.tensor(2 * _GEMM_SIZE**3 * best / 1e12, dtype=torch.float64)
    dist.all_reduce(rate, op=dist.ReduceOp.MIN)
    return float(rate)


def _gemms_per_s(a: torch.Tensor, b: torch.Tensor) -> float:
    began, count, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < _WINDOW_S:
        matmul(a, b)
        count, elapsed = count + 1, time.perf_counter() - began
    return count / elapsed
