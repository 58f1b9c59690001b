"""Step time and memory of a run from its typed config. Nothing here imports torch.

The one place where a config becomes what `parallel.planner.estimate` takes: moe-plan, moe-submit and the comparison
with published runs (`moe-plan validate`) come through here.
"""

from __future__ import annotations

from dataclasses import replace

from moe_train.config.plan import EstimateConfig
from moe_train.config.schema import Config
from moe_train.model.memory import weights_of, workload_of
from parallel.dispatchers import DISPATCHERS
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner import software
from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.hardware import Hardware
from parallel.planner.schedules import impossible
from parallel.planner.search import stages_under
from parallel.planner.software import Software
from parallel.planner.workload import Workload

MEGATRON = ("1f1b", "interleaved")
"""Pipeline schedules that moe-train runs."""
USUAL = EstimateConfig()


def estimate_run(cfg: Config, layout: ParallelLayout, plan: EstimateConfig = USUAL) -> Estimate:
    """The estimate of `cfg` (validated, with `layout`) under the fastest of `plan.schedules` that can run it.

    Raises:
        ConfigError: none of them can.
    """
    return estimates(cfg, plan, planned_workload(cfg, plan, layout))[0]


def estimates(cfg: Config, plan: EstimateConfig, workload: Workload, constants: Calibration = FITTED) -> list[Estimate]:
    """One for each of `plan.schedules` that can run the workload, fastest first.

    Raises:
        ConfigError: none of them can.
    """
    layout, model = workload.layout, cfg.model
    hardware = Hardware.of(cfg.cluster)
    timed: list[Estimate] = []
    reason = f"parallel.vpp={layout.vpp} needs interleaved" if layout.vpp > 1 else "interleaved needs parallel.vpp > 1"
    for schedule in plan.schedules:
        if (schedule == "interleaved") != (layout.vpp > 1):
            continue
        if reason := impossible(schedule, layout.pp, layout.vpp, workload.micro_batches):
            continue
        own = workload
        if schedule == "dualpipev":
            own = replace(workload, stages=stages_under(schedule, layout.pp, 1, model.num_layers, model.mtp_num_layers))
        weights = weights_of(model, own)
        assumed = software_of(cfg, plan, own, constants)
        timed.append(estimate(own, hardware, assumed, weights, schedule, constants))
    if not timed:
        raise ConfigError(f"plan.schedules={plan.schedules} cannot run this layout: {reason}", "use plan.search=true")
    return sorted(timed, key=lambda one: one.step.seconds)


def planned_workload(cfg: Config, plan: EstimateConfig, layout: ParallelLayout) -> Workload:
    """The workload of `cfg` as `plan` describes it; with its defaults it is that of moe-train.

    FP4 is counted as MXFP8, which needs more memory and time.
    """
    workload = workload_of(cfg, layout)
    if cfg.precision.fp4 and workload.fp8:
        workload = replace(workload, fp8="mxfp8")
    if plan.software == "deepseek":  # weights in FP8 alone, moments in 16 bits (arXiv 2412.19437, section 3.3.3)
        fp8 = workload.fp8 is not None
        workload = replace(workload, fp8_weights_only=fp8, compact=fp8, moment_bytes=2)
    return replace(
        workload, fsdp=plan.fsdp, frozen=plan.frozen_weights, loss=plan.loss,
        distributed_optimizer=workload.distributed_optimizer or plan.fsdp,
    )  # fmt: skip


def software_of(cfg: Config, plan: EstimateConfig, workload: Workload, constants: Calibration = FITTED) -> Software:
    """The software that a workload of `cfg` is timed with: what was usual at `plan.software_date` for its layout and
    precision, or DeepSeek's own, changed by what `plan` and `parallel.dispatcher` say.

    Raises:
        ConfigError: `plan.software_date` is not a month.
    """
    layout = workload.layout
    if not 1 <= plan.software_date % 100 <= 12:
        raise ConfigError(f"plan.software_date={plan.software_date} is not a month", "write year x 100 + month: 202604")
    if plan.software == "deepseek":
        base = software.deepseek_v3()  # with one dispatcher, of which DeepEP is a part
    else:
        experts = layout.ep * layout.etp if workload.model.num_experts else 1
        base = software.usual(plan.software_date, cfg.cluster.domain_gpus, experts, layout.vpp, workload.fp8)
        base = replace(base, dispatcher=DISPATCHERS[cfg.parallel.dispatcher].planned_as)
        # Tokens of one shape: whole layers run from CUDA graphs.
        if workload.model.pad_to_capacity and Hardware.of(cfg.cluster).blackwell:
            base = replace(base, graphs="full")
    return _as_stated(base, plan, constants)


def _as_stated(base: Software, plan: EstimateConfig, constants: Calibration) -> Software:
    """`base` with the fields that `plan` sets."""
    overlaps = plan.overlap_all_to_all
    if overlaps is None:
        overlaps = base.overlap_all_to_all and not plan.fsdp
    kernel = plan.attention_kernel
    return replace(
        base,
        graphs=plan.cuda_graphs or base.graphs,
        overlap_all_to_all=overlaps,
        overlap_tp=base.overlap_tp if plan.overlap_tp is None else plan.overlap_tp,
        flash_attention=base.flash_attention if kernel is None else kernel != "unfused",
        flash2=base.flash2 if kernel is None else kernel == "flash2",
        imbalance=constants.real_imbalance if plan.imbalance is None else plan.imbalance,
    )
