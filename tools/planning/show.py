"""The answer of `moe-plan` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from parallel.planner.estimate import Estimate
from parallel.planner.memory import StageMemory
from tools import kv_cache
from tools.memory import table as memory_table
from tools.planning.answer import Answer, duration

GIB = 2**30
PART_NAMES = {
    "gemm": "GEMM", "attention": "attention", "memory": "norms, activations, residuals, permutation",
    "quantize": "casts to FP8", "router": "router", "sync": "waiting for token counts",
    "all_to_all": "expert dispatch and combine",
    "tp": "tensor-parallel collectives, exposed", "cp": "context-parallel exchange",
    "fsdp": "weight gathering, exposed", "capacity": "choice of the tokens that fit",
    "recompute": "recomputation",
}  # fmt: skip
PASS_NAMES = {
    "1F": "forward passes", "1B": "backward passes", "1W": "weight gradients alone",
    "1F1B": "forward and backward at once", "bubble": "bubble",
    "optimizer": "optimizer, gradients, parameters, end of step",
}  # fmt: skip


def show(result: Answer, console: Console) -> None:
    """Everything, best plan first."""
    best = result.best
    console.print(headline(result), soft_wrap=True)
    console.print(plans(result))
    if result.asked:
        console.print(why(result, result.asked), soft_wrap=True)
        console.print(compared(result, result.asked))
    for text in refusals(result):
        console.print(text, soft_wrap=True)
    console.print(where(result, best))
    console.print(memory(result, _shown(best)))
    console.print(kv_cache.headline(result.kv_cache), soft_wrap=True)
    console.print(kv_cache_table(result))
    console.print(groups(result))
    if not result.fits:
        return
    if result.costs:
        console.print(costs(result))
        console.print(changes(result))
    else:
        console.print(f"Goodput {result.goodput.fraction:.1%}: {failures(result)}", soft_wrap=True)


def _shown(plan: Estimate) -> list[StageMemory]:
    stages, gib_of_rank = list(plan.memory), plan.memory_of_ranks
    return (
        stages
        if len(stages) <= 4
        else [stages[0], max(stages[1:-1], key=lambda stage: gib_of_rank[stage.stage]), stages[-1]]
    )


def memory(result: Answer, stages: Sequence[StageMemory]) -> Table:
    """Memory of pipeline stages; of a rank too where its schedule has more there than one stage under 1F1B."""
    best = result.best
    more = {}
    if best.schedule.startswith("dual"):
        gib_of_rank = best.memory_of_ranks
        more = {f"rank under {best.schedule}": [gib_of_rank[stage.stage] for stage in stages]}
    workload = best.workload
    title, shown = memory_table(result.cfg, workload.layout, stages, more)
    shown.title = (
        f"Memory of one rank, {workload.fp8 or workload.dtype}, micro-batches of "
        f"{workload.micro_batch_size} x {workload.seq_length:,} tokens:{title.rpartition(':')[2].partition(' of ')[0]}"
    )
    return shown


def kv_cache_table(result: Answer) -> Table:
    """The KV cache of the best plan's layout, at inference."""
    return kv_cache.table(result.kv_cache, result.best.workload.dtype)


def headline(result: Answer) -> str:
    """The best plan in two lines."""
    best, (causal, whole) = result.best, result.mfu(result.best)
    unused = f" ({result.gpus - result.used:,} spare)" if result.used < result.gpus else ""
    rate = best.step.tokens_per_s_per_gpu
    used, room = best.memory_bytes / GIB, result.hardware.usable_bytes / GIB
    tflops = [rate * flops / 1e12 for flops in (result.flops_causal, result.flops_whole)]
    return (
        f"{result.cfg.model.name} on {result.used:,} x {result.hardware.gpu}{unused}: {best.label}\n"
        f"step {best.step.seconds:.3f} s, {rate:,.1f} tokens/s/GPU; {tflops[0]:.0f} TFLOPS with causal attention "
        f"counted as such, {tflops[1]:.0f} as if it were not: MFU {causal:.1%} or {whole:.1%} of BF16; bubble "
        f"{best.step.pipeline.bubble_fraction:.1%}; {used:.1f} of {room:.1f} GiB on the peak rank"
        + ("" if result.fits else ": IT DOES NOT FIT")
    )


def plans(result: Answer) -> Table:
    """The plans that fit, fastest (and so cheapest) first."""
    searched = f"Plans that fit, of {result.found.tried:,} layouts, cheapest first"
    shown = Table(title=searched if result.cfg.plan.search else "The layout of parallel.*")
    priced = result.fits and result.price(result.best) is not None
    columns = ["plan", "precision", "step s", "tokens/s/GPU", "MFU", "bubble", "GiB"]
    for column in [*columns, *(["days", "dollars"] if priced else [])]:
        shown.add_column(column, justify="left" if column in ("plan", "precision") else "right", overflow="fold")
    for plan in result.found.plans:
        price = result.price(plan) if priced else None
        shown.add_row(
            plan.label, plan.workload.fp8 or plan.workload.dtype, f"{plan.step.seconds:.2f}",
            f"{plan.step.tokens_per_s_per_gpu:,.0f}", f"{result.mfu(plan)[0]:.1%}",
            f"{plan.step.pipeline.bubble_fraction:.1%}", f"{plan.memory_bytes / GIB:.1f}",
            *([f"{price[0]:,.1f}", f"{price[1]:,.0f}"] if price else []),
        )  # fmt: skip
    return shown


def why(result: Answer, requested: Estimate) -> str:
    """What makes the layout that was asked for slower than the best, in a sentence."""
    best, room = result.best, result.hardware.usable_bytes / GIB
    more = requested.step.seconds / requested.step.tokens * best.step.tokens / best.step.seconds - 1
    fits = "" if requested.memory_bytes / GIB <= room else f" and does not fit {room:.1f} GiB"
    if more <= 0:
        return f"The layout of parallel.* is {-more:.1%} faster than the best found{fits}."
    saved = sorted(((mine - its, name) for name, mine, its in _parts(requested, best)), reverse=True)
    worse = ", ".join(f"{name} {seconds:+.2f} s" for seconds, name in saved[:3] if seconds > 0)
    better = ", ".join(f"{name} {seconds:+.2f} s" for seconds, name in reversed(saved[-3:]) if seconds < 0)
    return (
        f"The layout of parallel.* ({requested.label}) takes {more:.1%} longer than the best{fits}: {worse}"
        + (f"; against {better}" if better else "") + "."
    )  # fmt: skip


def compared(result: Answer, requested: Estimate) -> Table:
    """The layout that was asked for, compared with the best."""
    shown = Table(title="The layout of parallel.* and the best, s of a step")
    for column in ("what", "asked for", "best", "difference"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    best = result.best
    for name, mine, its in [("step", requested.step.seconds, best.step.seconds), *_parts(requested, best)]:
        shown.add_row(name, f"{mine:.3f}", f"{its:.3f}", f"{mine - its:+.3f}")
    gib, its_held = requested.memory_bytes / GIB, best.memory_bytes / GIB
    shown.add_row("GiB on the peak rank", f"{gib:.1f}", f"{its_held:.1f}", f"{gib - its_held:+.1f}")
    shown.caption = "Parts but the bubble and the optimizer are counted as if nothing ran at the same time."
    return shown


def _parts(requested: Estimate, best: Estimate) -> list[tuple[str, float, float]]:
    """(name, seconds of the one, seconds of the other) of what a step consists of."""
    both = [{**{key: plan.step.components[key] for key in ("bubble", "optimizer")}, **plan.step.parts}
            for plan in (requested, best)]  # fmt: skip
    names = {**PASS_NAMES, **PART_NAMES}
    rows = [(names[key], both[0].get(key, 0.0), both[1].get(key, 0.0)) for key in {**both[0], **both[1]}]
    return sorted(rows, key=lambda row: row[2] - row[1])


def refusals(result: Answer) -> list[str]:
    """Why other layouts do not fit, commonest reason first."""
    search = result.found
    return [
        f"{times:,} layouts: {reason}, such as {search.examples[reason]}"
        for reason, times in search.reasons.most_common()
    ]


def where(result: Answer, plan: Estimate) -> Table:
    """Where a step's time goes: by passes, and by what the passes do."""
    shown = Table(title="Where a step goes, mean pipeline rank")
    for column in ("what", "s", "of the step"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    step = plan.step
    for key, value in step.components.items():
        shown.add_row(PASS_NAMES[key], f"{value:.3f}", f"{value / step.seconds:.1%}")
    shown.add_section()
    for key, value in sorted(step.parts.items(), key=lambda item: -item[1]):
        shown.add_row(f"{PART_NAMES[key]}", f"{value:.3f}", f"{value / step.seconds:.1%}")
    shown.caption = (
        "The lower half counts each part as if nothing ran at the same time. Where passes take longer than all of it, "
        "the host is late with kernels, or ranks wait for the slowest."
    )
    return shown


def groups(result: Answer) -> Table:
    """Groups of ranks on the network."""
    shown = Table(title="Groups on the network")
    for column in (
        "group",
        "ranks",
        "groups",
        "NVLink domains",
        "leaves its pod",
        "GB a rank sends to other domains in a step",
    ):
        shown.add_column(column, justify="left" if column == "group" else "right")
    for group in result.placements:
        shown.add_row(
            group.kind, f"{group.size:,}", f"{group.groups:,}", f"{group.domains:,}",
            "yes" if group.crosses_pods else "no", f"{group.network_bytes / 1e9:,.2f}",
        )  # fmt: skip
    return shown


def costs(result: Answer) -> Table:
    """What each stage of the recipe takes, without failures."""
    shown = Table(title="Cost, without failures")
    for column in ("stage", "tokens", "days", "GPU-hours", "dollars", "kWh", "t CO2"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    for bill in [*result.costs, *([result.total()] if len(result.costs) > 1 else [])]:
        shown.add_row(
            bill.name, f"{bill.tokens / 1e9:,.1f}B" if bill.tokens else "",
            "" if bill.days is None else f"{bill.days:,.1f}",
            f"{bill.gpu_hours:,.0f}", f"{bill.dollars:,.0f}", f"{bill.kwh:,.0f}", f"{bill.kg_co2 / 1000:,.1f}",
        )  # fmt: skip
    return shown


def changes(result: Answer) -> Table:
    """The table of the sensitivity analysis."""
    shown = Table(title=f"Sensitivity ({failures(result)})")
    for column in ("change", "goodput", "days", "dollars"):
        shown.add_column(column, justify="left" if column == "change" else "right")
    for name, fraction, days, dollars in result.sensitivity:
        shown.add_row(name, f"{fraction:.1%}", f"{days:,.1f}", f"{dollars:,.0f}")
    return shown


def failures(result: Answer) -> str:
    """Failures that are expected, and checkpoints against them."""
    now, interval = result.goodput, result.cfg.plan.checkpoint_interval_s
    return (
        f"{now.failures_per_day:.2f} failures a day; a checkpoint takes {duration(now.save_s)}, "
        f"{'asked for' if interval else 'best'} every {duration(now.interval_s)}"
    )
