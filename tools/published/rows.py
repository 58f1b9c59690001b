"""A published run as a configuration that the planner can time. No torch import.

What a row leaves out is filled by rules that hold for every row: see `FILLED`. A row that cannot be modelled says why.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moe_train.config.model import ModelConfig
from moe_train.config.plan import EstimateConfig
from moe_train.config.schema import (
    BatchConfig,
    Config,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainConfig,
)
from parallel.dispatchers import ALLTOALL
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner import software
from parallel.planner.hardware import Hardware
from tools.published import clusters, models
from tools.published.table import PublishedRun

FILLED = """\
tp, pp, vpp, cp, ep, etp, micro-batch: 1; vpp, where the source says that it is unpublished: the fastest that fits
memory. dp: fills the GPUs. seq_len: 4,096. Recomputation: the least that fits memory. Software: what was usual in the
month of the row (`parallel.planner.software`), where the row does not say otherwise; until November 2025 expert
dispatch by NCCL within a node of 8, and for tokens padded to the capacity of experts. Before June 2024: gradients in
fp32 and optimizer state on every rank. Weights in FP8 are kept in FP8 alone. TFLOPS and MFU become tokens/s by the
source's own convention: causal where it says so, and from 2025.04 on."""

# From here on runs had a distributed optimizer and gradients in bf16.
DISTRIBUTED_OPTIMIZER_FROM = 202406
CAUSAL_FLOPS_FROM = 202504
HALF = "half"


@dataclass(frozen=True)
class Row:
    """A published run, understood.

    Args:
        index: number of the row, from 0.
        run: the row of the table.
        cfg: the run as a configuration; its recomputation and vpp are the published ones, where they are known.
        plan: its software, as far as the source states it.
        layout: its degrees.
        micro_batches: of a rank in a step.
    """

    index: int
    run: PublishedRun
    cfg: Config
    plan: EstimateConfig
    layout: ParallelLayout
    micro_batches: int

    @property
    def model(self) -> ModelConfig:
        """The architecture that was trained."""
        return self.cfg.model

    @property
    def hardware(self) -> Hardware:
        """What it ran on."""
        return Hardware.of(self.cfg.cluster)

    @property
    def month(self) -> int:
        """Year x 100 + month of its software."""
        return self.plan.software_date

    @property
    def schedule(self) -> str | None:
        """Its pipeline schedule, where that is not Megatron-Core's."""
        return self.run.schedule or None

    @property
    def open_vpp(self) -> bool:
        """Whether vpp is not published, so that the planner chooses."""
        return self.run.vpp_published is False

    @property
    def open_recompute(self) -> bool:
        """The same of recomputation."""
        return not self.run.recompute

    @property
    def configuration(self) -> str:
        """What makes two rows the same configuration: model, hardware, GPUs, layout, batch, precision; not the
        release."""
        run, model, recompute = self.run, self.model, self.cfg.recompute
        degrees = "|".join(f"{field.name}={getattr(self.layout, field.name)}" for field in fields(self.layout))
        batch = f"{self.cfg.batch.micro_batch_size}x{self.micro_batches}x{self.cfg.train.seq_length}"
        recomputed = "" if self.open_recompute else f"{recompute.mode}{recompute.num_layers}{recompute.modules}"
        overlap_tp = software.of_date(self.month).overlap_tp if run.overlap_tp is None else run.overlap_tp
        parts = f"{bool(run.fsdp)}|{overlap_tp}|{model.mtp_num_layers}|{model.capacity_factor}"
        return "|".join([model.name, self.hardware.name, run.precision, degrees, batch, recomputed, parts])


def understand(index: int, run: PublishedRun, directory: str | None = None) -> Row | str:
    """The row, or why there is no prediction for it."""
    model = models.find(run.model, directory)
    if model is None:
        return "no model of that name: its shape is not stated, or outside the schema (Mamba, sparse attention)"
    if not run.hardware:
        return "the hardware is not stated"
    if run.hardware not in clusters.names():
        return f"hardware={run.hardware} is not a file of conf/cluster"
    if run.not_modelled:
        return run.not_modelled
    if run.n_gpus is None or not (run.tp or run.pp or run.ep):
        return "the layout is not stated"
    if run.month is None:
        return "the month is not stated"
    degrees = {name: getattr(run, name) or 1 for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    try:
        layout = ParallelLayout.resolve(**degrees, world_size=run.n_gpus)
    except ConfigError as error:
        return f"the layout does not fit: {error.cause}"
    if run.gbs is None:
        return "the batch is not stated"
    micro_batches = max(1, round(run.gbs / ((run.mbs or 1) * layout.dp)))
    cfg = _config(run, _as_trained(model, run), layout, micro_batches)
    return Row(index, run, cfg, _plan(run), layout, micro_batches)


def _as_trained(model: ModelConfig, run: PublishedRun) -> ModelConfig:
    if run.mtp is False:
        model = replace(model, mtp_num_layers=0)
    if run.capacity_factor is not None:  # padded to one shape
        model = replace(model, capacity_factor=run.capacity_factor, pad_to_capacity=True)
    return model


def _config(run: PublishedRun, model: ModelConfig, layout: ParallelLayout, micro_batches: int) -> Config:
    """The run as a user would configure it."""
    size, month = run.mbs or 1, run.month or 0
    return Config(
        model=model,
        cluster=clusters.cluster_config(run.hardware),
        runtime="cuda",
        parallel=ParallelConfig(
            **{field.name: getattr(layout, field.name) for field in fields(layout)},
            sequence_parallel=run.sequence_parallel if layout.tp > 1 else False,
            distributed_optimizer=month >= DISTRIBUTED_OPTIMIZER_FROM,
            dispatcher=run.dispatcher or _usual_dispatcher(run, model, layout),
        ),
        precision=_precision(run),
        recompute=_recompute(run.recompute, model),
        batch=BatchConfig(global_batch_size=size * micro_batches * layout.dp, micro_batch_size=size),
        train=TrainConfig(seq_length=run.seq_len or 4096),
    )


def _usual_dispatcher(run: PublishedRun, model: ModelConfig, layout: ParallelLayout) -> str:
    """Within a node NCCL's all-to-all was usual at first, and for tokens padded to capacity there was nothing else."""
    if not model.is_moe:
        return ALLTOALL.name
    month, domain = run.month or 0, clusters.hardware_of(run.hardware).domain_gpus
    in_node = layout.ep * layout.etp <= domain <= 8
    if month < software.GRAPHS_FROM and (in_node or run.capacity_factor is not None):
        return ALLTOALL.name
    return software.of_date(month).dispatcher


def _precision(run: PublishedRun) -> PrecisionConfig:
    fp8 = run.precision if run.precision in ("block", "tensor", "mxfp8") else None
    fp4 = run.precision if run.precision == "nvfp4" else None
    recent = (run.month or 0) >= DISTRIBUTED_OPTIMIZER_FROM
    return PrecisionConfig(
        name=run.precision,
        dtype="bf16",
        fp8=fp8,
        fp4=fp4,
        fp8_param_gather=bool(fp8 or fp4),
        grad_reduce_fp32=bool(run.schedule) or not recent,
        moments_dtype=run.moments_dtype or "fp32",
    )


def _recompute(text: str, model: ModelConfig) -> RecomputeConfig:
    if text in ("", "none", "full"):
        return RecomputeConfig(mode=text or "none")
    if text == HALF:
        return RecomputeConfig(mode="full", method="block", num_layers=max(1, model.num_layers // 2))
    return RecomputeConfig(mode="selective", modules=sorted(text.split("+")) if text != "selective" else [])


def _plan(run: PublishedRun) -> EstimateConfig:
    plan = EstimateConfig(
        software=run.software,
        software_date=run.month or 0,
        cuda_graphs=run.cuda_graphs or None,
        overlap_all_to_all=run.overlap_all_to_all,
        overlap_tp=run.overlap_tp,
        attention_kernel=run.attention_kernel or None,
        imbalance=None if run.routing == "learned" else 1.0,
        fsdp=bool(run.fsdp),
        frozen_weights=bool(run.frozen_weights),
        loss=run.loss,
    )
    return replace(plan, schedules=[run.schedule]) if run.schedule else plan
