"""The answer of `moe-plan`: plans, the cost of the whole recipe, sensitivity analysis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from moe_train.config.plan import TrainingStage
from moe_train.config.roots import PlanRoot
from moe_train.config.rules.precision import recipe
from moe_train.model.arithmetic import flops_per_token
from moe_train.model.estimate import estimates, planned_workload, software_of
from moe_train.model.memory import checkpoint_bytes, weights_of
from parallel.architecture.attention import modules_of_other_attentions
from parallel.dispatchers import DISPATCHERS, PLANNED
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner import cost
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.hardware import Hardware
from parallel.planner.placement import Placement, placements
from parallel.planner.schedules import impossible
from parallel.planner.search import STATIC, SearchResult, Space, Timer, search
from parallel.planner.workload import Recompute, Workload
from parallel.suggest import Impossible
from tools import kv_cache
from tools.kv_cache import CacheAnswer
from tools.planning.recipe import stages

MODULES = (
    (), ("moe_act",), ("mla_up_proj",), ("layernorm",), ("layernorm", "moe_act"), ("layernorm", "mla_up_proj"),
    ("layernorm", "moe_act", "mla_up_proj"), ("layernorm", "moe_act", "mla_up_proj", "mlp"),
)  # fmt: skip
ROUND_TO = (1, 8, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class Answer:
    """Everything that is shown, written and drawn.

    Args:
        gpus: requested GPUs; the plans may leave some of them unused.
        asked: the layout of `parallel.*`, where a search was given one to compare with.
        costs: one for each stage of the recipe.
        recipe: the stages of the whole training.
        plans_of_stages: the plan of each stage that was timed, by its name.
        sensitivity: (change, useful part of the time, days, dollars) of the whole recipe.
        kv_cache: of the best plan's layout, at inference.
    """

    cfg: PlanRoot
    hardware: Hardware
    gpus: int
    found: SearchResult
    best: Estimate
    flops_causal: float
    flops_whole: float
    goodput: cost.Goodput
    placements: list[Placement]
    recipe: list[TrainingStage]
    kv_cache: CacheAnswer
    asked: Estimate | None = None
    costs: list[cost.CostEstimate] = field(default_factory=list)
    plans_of_stages: dict[str, Estimate] = field(default_factory=dict)
    sensitivity: list[tuple[str, float, float, float]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the best plan fits the memory of its GPUs: always after a search, which offers no other."""
        return self.best.fits

    @property
    def used(self) -> int:
        """GPUs that the best plan uses."""
        return self.best.workload.layout.world_size

    def mfu(self, plan: Estimate) -> tuple[float, float]:
        """Parts of the BF16 peak that model FLOPs take: causal attention counted as such, and as if it were not."""
        rate = plan.step.tokens_per_s_per_gpu / (self.hardware.bf16_tflops * 1e12)
        return rate * self.flops_causal, rate * self.flops_whole

    def price(self, plan: Estimate) -> tuple[float, float] | None:
        """Days and dollars in which a plan trains the tokens of the recipe that run as planned, without failures.

        None without a number of tokens. GPUs that the plan leaves idle are paid for.
        """
        tokens = sum(stage.tokens for stage in self.recipe if stage.as_planned and stage.tokens)
        if not tokens:
            return None
        hours = cost.gpu_hours(tokens, plan.step.tokens_per_s_per_gpu) * self.gpus / plan.workload.layout.world_size
        return hours / self.gpus / 24, hours * self.hardware.dollars_per_gpu_hour

    def total(self) -> cost.CostEstimate:
        """The sum of all stages."""
        costs = self.costs
        days = sum(stage.days for stage in costs if stage.days is not None)
        return cost.CostEstimate(
            "total", sum(b.tokens for b in costs), sum(b.gpu_hours for b in costs), days,
            sum(b.dollars for b in costs), sum(b.kwh for b in costs), sum(b.kg_co2 for b in costs),
        )  # fmt: skip


def answer(cfg: PlanRoot, layout: ParallelLayout) -> Answer:
    """Plan `cfg` (validated, with `layout`).

    Raises:
        ConfigError: nothing fits, with the commonest reason; or the accelerator lacks the precision.
    """
    hardware = Hardware.of(cfg.cluster)
    _check(cfg, hardware)
    gpus, recipe = cfg.plan.gpus or layout.world_size, stages(cfg.plan.recipe, cfg.train.tokens)
    base = planned_workload(cfg, cfg.plan, layout)
    plans = searched(cfg, base, gpus) if cfg.plan.search else given(cfg, base, gpus)
    best = plans.plans[0]
    weights = weights_of(cfg.model, best.workload)
    heaviest = max(weights, key=lambda w: w.shared + w.experts)
    ranks = best.workload.layout.world_size
    result = Answer(
        cfg=cfg, hardware=hardware, gpus=gpus, found=plans, best=best,
        flops_causal=flops_per_token(cfg.model, cfg.train.seq_length),
        flops_whole=flops_per_token(cfg.model, cfg.train.seq_length, causal=False),
        goodput=cost.goodput(
            hardware, checkpoint_bytes(cfg, best.workload), ranks, cfg.plan.checkpoint_interval_s
        ),
        placements=placements(best.workload, hardware, best.software, heaviest), recipe=recipe,
        kv_cache=kv_cache.answer(cfg, best.workload, weights),
    )  # fmt: skip
    if cfg.plan.search and max(layout.tp, layout.pp, layout.cp, layout.ep) > 1:
        with contextlib.suppress(ConfigError):  # a layout for another number of GPUs is nothing to compare with
            result.asked = given(cfg, base, gpus).plans[0]
    if not result.fits:  # what cannot run has no cost
        return result
    for stage in recipe:
        result.costs.append(stage_cost(result, stage))
    result.sensitivity = sensitivity(result)
    return result


def _check(cfg: PlanRoot, hardware: Hardware) -> None:
    kv_cache.check(cfg)
    recipes = [name for name in (recipe(cfg.precision), *cfg.plan.precisions) if name not in (None, "none")]
    if cfg.runtime != "cpu":  # on a CPU the `local` backend computes in FP8 too: it rounds
        for refusal in map(hardware.refusal, recipes):
            if refusal:
                raise refusal
    if cfg.precision.fp4:
        raise ConfigError(f"precision.fp4={cfg.precision.fp4} is not timed by moe-plan", "use precision=mxfp8")
    for name in ("schedules", "micro_batch_sizes"):
        if not getattr(cfg.plan, name):
            raise ConfigError(f"plan.{name}=[] leaves nothing to try", f"leave plan.{name} out")


def space_of(cfg: PlanRoot) -> Space:
    """What is searched."""
    model, plan = cfg.model, cfg.plan
    gpus = cfg.cluster.multiprocessors > 1
    foreign = modules_of_other_attentions(model)
    sets: list[Recompute] = []
    for modules in MODULES:
        usable = frozenset(
            m for m in modules
            if m not in foreign and not (m == "moe_act" and not model.is_moe)
            and not (m == "mlp" and 0 not in model.moe_layer_pattern)
        )  # fmt: skip
        candidate: Recompute = ("selective" if usable else "none", usable)
        if candidate not in sets:
            sets.append(candidate)
    fp8 = tuple(None if name == "none" else name for name in plan.precisions) or (cfg.precision.fp8,)
    cp = tuple(plan.cp) or ((1, 2, 4, 8, 16) if cfg.train.seq_length >= 16384 else (1,))
    return Space(
        cp=cp, ep=tuple(e for e in (2**n for n in range(11)) if e <= max(1, model.num_experts)),
        micro_batch_size=tuple(plan.micro_batch_sizes), recompute=(*sets, ("full", frozenset())),
        schedules=tuple(plan.schedules), fp8=fp8,
        dispatchers=tuple(name for name in PLANNED if gpus or not DISPATCHERS[name].needs_gpu),
    )  # fmt: skip


def searched(cfg: PlanRoot, base: Workload, gpus: int) -> SearchResult:
    """The best of all layouts. Where the GPUs do not divide, some are left unused."""
    timer = Timer(
        Hardware.of(cfg.cluster),
        software_of=lambda workload: software_of(cfg, cfg.plan, workload),
        weights_of=lambda workload: weights_of(cfg.model, workload),
    )
    best: SearchResult | None = None
    counts = sorted(sizes(gpus, cfg.batch.global_batch_size), reverse=True)
    last = SearchResult()
    for count in counts:
        result = search(base, timer, count, cfg.batch.global_batch_size, space_of(cfg), cfg.plan.top)
        last = result if result.tried >= last.tried else last
        if result.plans and (best is None or _rate(result) > _rate(best)):
            best = result
    if not last.tried:
        raise ConfigError(f"plan.cp={cfg.plan.cp} divides none of {counts} GPUs", "use plan.cp=[1]")
    if best is None:
        reason, times = (last.reasons.most_common(1) or [("no layout fills the GPUs", 1)])[0]
        raise ConfigError(
            f"no layout of {cfg.model.name} fits {gpus:,} GPUs of {cfg.cluster.name}: {reason} "
            f"({times} of {last.tried} layouts)",
            "use more GPUs (plan.gpus), or a cluster with more memory"
            if reason == STATIC
            else "use more GPUs, a larger batch.global_batch_size, or shorter sequences",
        )
    return best


def sizes(gpus: int, batch: int) -> set[int]:
    """How many of the GPUs to try to use: all, whole groups of `ROUND_TO`, and most of them where that is a divisor of
    the batch times a power of 2."""
    rounded = {gpus - gpus % unit for unit in ROUND_TO if unit <= gpus}
    odd = [size for size in range(1, min(batch, gpus) + 1, 2) if batch % size == 0]
    filled = {size << (gpus // size).bit_length() - 1 for size in odd}
    return rounded if gpus in filled else rounded | {size for size in filled if size > 0.75 * gpus}


def _rate(result: SearchResult) -> float:
    step = result.plans[0].step
    return step.tokens / step.seconds


def given(cfg: PlanRoot, base: Workload, gpus: int) -> SearchResult:
    """The layout of `parallel.*`, over `gpus` GPUs, under the first schedule that fits it."""
    start = base.layout
    each = start.tp * start.pp * start.cp
    if gpus % each:
        raise Impossible(
            f"parallel.tp x pp x cp = {each} does not divide plan.gpus={gpus}",
            [{"plan.gpus": max(each, gpus - gpus % each)}],
        )
    layout = ParallelLayout.resolve(
        tp=start.tp, pp=start.pp, vpp=start.vpp, cp=start.cp, ep=start.ep, etp=start.etp, world_size=gpus
    )
    batch, size = cfg.batch.global_batch_size, cfg.batch.micro_batch_size
    if batch % (size * layout.dp):
        raise ConfigError(
            f"batch.global_batch_size={batch} is not a multiple of batch.micro_batch_size x parallel.dp = {size} x "
            f"{layout.dp} on plan.gpus={gpus}",
            f"use batch.global_batch_size={max(1, batch // (size * layout.dp)) * size * layout.dp}, or other plan.gpus",
        )
    workload = replace(base, layout=layout, micro_batches=max(1, batch // (size * layout.dp)))
    return SearchResult(estimates(cfg, cfg.plan, workload), tried=1)


def stage_cost(result: Answer, stage: TrainingStage) -> cost.CostEstimate:
    """What one stage of the recipe takes under the best plan, adapted to its sequences and batch."""
    hardware = result.hardware
    if stage.gpu_hours is not None:
        return cost.estimate_cost(hardware, stage.name, stage.gpu_hours, None)
    plan = result.best if stage.as_planned else adapted(result, stage)
    result.plans_of_stages[stage.name] = plan
    tokens: float = stage.tokens if stage.tokens is not None else float(plan.step.tokens * (stage.steps or 1))
    useful = result.goodput.fraction if stage.failures else 1.0
    hours = cost.gpu_hours(tokens, plan.step.tokens_per_s_per_gpu * useful) * result.gpus / result.used
    # Unused GPUs are paid for too, and draw next to no power.
    return cost.estimate_cost(hardware, stage.name, hours, result.gpus, tokens, busy=result.used / result.gpus)


def adapted(result: Answer, stage: TrainingStage) -> Estimate:
    """The best plan with other sequences: same stages and experts, the smallest cp that can run, where the stage has
    none of its own, and the least recomputation that fits.

    Raises:
        ConfigError: the stage cannot run on the same ranks.
    """
    layout = result.best.workload.layout
    more = [
        layout.cp << power for power in range((layout.cp * layout.dp).bit_length()) if layout.dp % (1 << power) == 0
    ]
    for cp in [stage.cp] if stage.cp else more:
        try:
            return _adapted(result, stage, cp)
        except ConfigError as error:
            reason = error
    raise reason


def _adapted(result: Answer, stage: TrainingStage, cp: int) -> Estimate:
    best = result.best
    workload, layout = best.workload, best.workload.layout
    ranks = layout.tp * layout.cp * layout.dp
    if ranks % (layout.tp * cp):
        raise ConfigError(f"plan.recipe: cp={cp} of '{stage.name}' does not divide {ranks} ranks", "use another cp")
    layout = replace(layout, cp=cp, dp=ranks // (layout.tp * cp))
    size = workload.micro_batch_size if stage.seq_length is None else 1
    batch = stage.global_batch_size or result.cfg.batch.global_batch_size
    if batch % (size * layout.dp):
        raise ConfigError(
            f"plan.recipe: global_batch_size={batch} of '{stage.name}' is not a multiple of micro-batch x dp = "
            f"{size} x {layout.dp} at cp={cp}",
            f"use global_batch_size={-(-batch // (size * layout.dp)) * size * layout.dp}, or a larger cp",
        )
    micro_batches = batch // (size * layout.dp)
    if reason := impossible(best.schedule, layout.pp, layout.vpp, micro_batches):
        raise ConfigError(
            f"plan.recipe: '{stage.name}' cannot run under the plan's schedule: {reason}", "use a larger cp"
        )
    other = replace(
        workload, layout=layout, seq_length=stage.seq_length or workload.seq_length, micro_batch_size=size,
        micro_batches=micro_batches,
    )  # fmt: skip
    weights = weights_of(result.cfg.model, other)
    for recomputed in _more_recomputation(other, result.cfg):
        plan = estimate(recomputed, result.hardware, best.software, weights, best.schedule)
        if plan.memory_bytes <= result.hardware.offered_bytes:
            return plan
    raise ConfigError(f"plan.recipe: '{stage.name}' does not fit memory on these ranks", "use a larger cp")


def _more_recomputation(workload: Workload, cfg: PlanRoot) -> Iterator[Workload]:
    """The workload itself, and with every set of modules that recomputes at least as many of them."""
    yield workload
    for mode, modules in space_of(cfg).recompute:
        if len(modules) >= len(workload.recompute_modules) or mode == "full":
            yield replace(workload, recompute=mode, recompute_modules=modules, recompute_of_chunks=())


def sensitivity(result: Answer) -> list[tuple[str, float, float, float]]:
    """Sensitivity analysis: the total cost under other prices, speeds, failures and checkpoint intervals."""
    hardware, size, settings = result.hardware, checkpoint_bytes(result.cfg, result.best.workload), result.cfg.plan
    gpus, now = result.used, result.goodput
    both = list(zip(result.recipe, result.costs, strict=True))
    whole = sum(  # without failures
        bill.gpu_hours * (now.fraction if stage.failures else 1.0) for stage, bill in both if not stage.gpu_hours
    )
    known = sum(stage.gpu_hours or 0.0 for stage in result.recipe)  # these do not change
    rows = []

    def row(name: str, changed: Hardware, speed: float = 1.0, interval: float | None = None) -> None:
        fraction = cost.goodput(changed, size, gpus, interval or settings.checkpoint_interval_s).fraction
        hours = whole / speed / fraction
        rows.append((name, fraction, hours / result.gpus / 24, (hours + known) * changed.dollars_per_gpu_hour))

    row("as planned, with failures and checkpoints", hardware, interval=now.interval_s)
    for factor in (0.75, 1.25):
        price = hardware.dollars_per_gpu_hour * factor
        row(f"price ${price:.2f} an hour", replace(hardware, dollars_per_gpu_hour=price))
    for factor in (0.9, 1.1):
        row(f"MFU {factor - 1:+.0%}", hardware, speed=factor)
    for factor in (0.5, 2, 4):
        changed = replace(hardware, gpu_days_between_failures=hardware.gpu_days_between_failures / factor)
        row(f"{cost.failures_per_day(changed, gpus):.2f} failures a day", changed)
    if settings.checkpoint_interval_s:
        best = cost.goodput(hardware, size, gpus).interval_s
        row(f"a checkpoint every {duration(best)}, the best interval", hardware, interval=best)
    for factor in (0.25, 4, 16):
        row(f"a checkpoint every {duration(now.interval_s * factor)}", hardware, interval=now.interval_s * factor)
    return rows


def duration(seconds: float) -> str:
    """In minutes, or in seconds where it has few."""
    return f"{seconds / 60:.0f} min" if seconds >= 300 else f"{seconds:.3g} s"
