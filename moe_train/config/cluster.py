"""The machines that a run is planned for. YAML files under `conf/cluster/` fill it. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class ClusterConfig:
    """One kind of accelerator, how many of them are joined how, and what an hour costs.

    Peaks are dense ones from the maker's data sheet; `*_fraction` is what long-running kernels achieve of them.
    """

    name: str = doc("h800", "Name of the cluster, for reports.")
    gpu: str = doc("NVIDIA H800 SXM 80GB", "The accelerator.")
    bf16_tflops: float = doc(989.4, "Dense BF16 peak of one GPU, TFLOPS.", minimum=1e-6)
    fp8_tflops: float = doc(
        1978.9, "Dense FP8 peak of one GPU, TFLOPS; the BF16 peak where it has no FP8.", minimum=1e-6
    )
    fp32_tflops: float = doc(66.9, "FP32 peak of one GPU, TFLOPS.", minimum=1e-6)
    multiprocessors: int = doc(132, "Multiprocessors: tiles of a GEMM that run concurrently.", minimum=1)
    memory_gib: float = doc(80.0, "Memory of one GPU, GiB.", minimum=1e-6)
    reserved_gib: float = doc(1.4, "Memory that torch cannot allocate (CUDA context, NCCL), GiB.", minimum=0)
    memory_tb_per_s: float = doc(3.35, "Peak memory bandwidth of one GPU, TB/s.", minimum=1e-6)
    domain_gpus: int = doc(8, "GPUs joined by NVLink.", minimum=1)
    domain_gb_per_s: float = doc(200.0, "NVLink bandwidth of one GPU, each way, GB/s.", minimum=1e-6)
    network_gb_per_s: float = doc(50.0, "Network bandwidth of one GPU, each way, GB/s.", minimum=1e-6)
    pod_gpus: int = doc(2048, "GPUs in one non-blocking part of the network.", minimum=1)
    spine_fraction: float = doc(1.0, "Bandwidth between such parts, relative to that within one.", minimum=1e-6)
    bf16_fraction: float = doc(0.803, "Fraction of the BF16 peak that the best GEMM reaches.", minimum=1e-6)
    fp8_fraction: float = doc(0.783, "Fraction of the FP8 peak that the best GEMM reaches.", minimum=1e-6)
    power_limit_watts: float = doc(700.0, "Power limit of one GPU, W.", minimum=1e-6)
    measured_at_watts: float = doc(700.0, "Power limit at which these fractions were measured, W.", minimum=1e-6)
    attention_fraction: float = doc(
        0.64, "Fraction of the BF16 peak, attention forward at 16,384 tokens.", minimum=1e-6
    )
    attention_backward_fraction: float = doc(0.545, "The same for the backward pass.", minimum=1e-6)
    flash2_fraction: float = doc(0.339, "The same for FlashAttention-2, both passes.", minimum=1e-6)
    memory_fraction: float = doc(0.89, "Fraction of the memory bandwidth that a copy reaches.", minimum=1e-6)
    domain_fraction: float = doc(0.79, "Fraction of the NVLink bandwidth that collectives reach.", minimum=1e-6)
    network_fraction: float = doc(0.86, "Fraction of the network bandwidth that collectives reach.", minimum=1e-6)
    domain_latency_us: float = doc(15.0, "Latency of a collective within an NVLink domain, microseconds.", minimum=0)
    network_latency_us: float = doc(25.0, "Latency of a collective over the network, microseconds.", minimum=0)
    watts_per_gpu: float = doc(1275.0, "Power of one GPU including its share of the node, W.", minimum=0)
    power_usage_effectiveness: float = doc(1.2, "Power usage effectiveness (PUE) of the data centre.", minimum=1)
    dollars_per_gpu_hour: float = doc(2.0, "Price of one GPU for an hour, US dollars.", minimum=0)
    kg_co2_per_kwh: float = doc(0.58, "Carbon intensity of the grid, kg CO2 a kWh.", minimum=0)
    gpu_days_between_failures: float = doc(
        2111.0, "Mean time between failures that stop a job, GPU-days.", minimum=1e-6
    )
    restart_s: float = doc(600.0, "Time from a failure to the next step, seconds.", minimum=0)
    storage_gb_per_s_per_gpu: float = doc(
        0.24, "Write bandwidth of one GPU's part of a checkpoint, GB/s.", minimum=1e-9
    )
