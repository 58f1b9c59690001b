"""The layouts with which a job may come back on another number of nodes. No torch import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.checks import spans
from launch.slurm.estimate import RunEstimate, check_memory, run_estimate
from moe_train.config.composition.fallback import candidates
from moe_train.config.composition.validate import fit, validate
from moe_train.config.plan import EstimateConfig
from moe_train.config.resolve import job_gpus_per_node
from moe_train.config.schema import Config
from moe_train.model.estimate import USUAL
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Choice:
    """A layout, and the numbers of nodes on which the job takes it, fewest first.

    `text` shows the entry of `launcher.fallbacks`; "" for the config's own. `layout` and `estimate` are those on the
    fewest nodes, where a rank needs most memory.
    """

    text: str
    cfg: Config
    counts: tuple[int, ...]
    layout: ParallelLayout
    estimate: RunEstimate


def choices(cfg: Config, nodes: int, plan: EstimateConfig = USUAL) -> list[Choice]:
    """What the job takes on `launcher.min_nodes` to `nodes` nodes. A number between them may have no layout.

    Raises:
        ConfigError: the fewest nodes have no layout, a layout is never taken, or it does not fit its GPUs.
    """
    launcher = cfg.launcher
    fewest = launcher.min_nodes or nodes
    if fewest > nodes:
        raise ConfigError(
            f"launcher.min_nodes={fewest} exceeds the {nodes} nodes of the job", f"use launcher.min_nodes={nodes}"
        )
    tried = candidates(cfg)
    counts_taken: list[list[int]] = [[] for _ in tried]
    for count in range(fewest, nodes + 1):
        ranks = count * launcher.ranks_per_node
        first = next((place for place, (_, candidate) in enumerate(tried) if fit(candidate, ranks)), None)
        if first is not None:
            counts_taken[first].append(count)
    layouts = list(zip(tried, counts_taken, strict=True))
    for (text, candidate), counts in layouts:
        if text and not counts:
            raise _never_taken(text, candidate, fewest, nodes)
    if not any(fewest in counts for counts in counts_taken):
        _refuse_fewest(cfg, fewest, sorted(count for counts in counts_taken for count in counts))
    return [_choice(text, candidate, counts, nodes, plan) for (text, candidate), counts in layouts if counts]


def shown(counts: Sequence[int]) -> str:
    """Numbers of nodes, the first few where they are many."""
    return ", ".join(map(str, counts[:5])) + (", ..." if len(counts) > 5 else "")


def degrees(layout: ParallelLayout) -> str:
    """The layout in a few words."""
    return f"{layout.label} edp{layout.edp}"


def fewer(options: Sequence[Choice], nodes: int) -> list[str]:
    """Lines on what the job does with fewer than `nodes` nodes."""
    lines, all_counts = [], {count for choice in options for count in choice.counts}
    for choice in options:
        if counts := [count for count in choice.counts if count < nodes]:
            lines.append(
                f"{shown(counts)} nodes: {degrees(choice.layout)}, {choice.estimate.memory_gib:,.1f} GiB"
                + (f" ({choice.text})" if choice.text else "")
            )
            each = choice.cfg.launcher.ranks_per_node
            lines += spans(choice.layout, each) if choice.text and choice.cfg.runtime != "cpu" else []
    # With this number of nodes the most stay idle.
    idle, worst = max((got - max(c for c in all_counts if c <= got), got) for got in range(min(all_counts), nodes + 1))
    if idle:
        lines.append(
            "with another number of nodes it takes the largest of these that fits; others stay idle, and cost: at most "
            f"{idle} of {worst} nodes{_price(options[0].cfg, idle)}"
        )
    return lines


def _price(cfg: Config, nodes: int) -> str:
    """Of these nodes, in words; "" for those without GPUs."""
    if cfg.runtime == "cpu":
        return ""
    gpus = job_gpus_per_node(cfg)
    return f", ${nodes * gpus * cfg.cluster.dollars_per_gpu_hour:,.0f} an hour"


def _choice(text: str, cfg: Config, counts: list[int], nodes: int, plan: EstimateConfig) -> Choice:
    layout = validate(cfg, counts[0] * cfg.launcher.ranks_per_node)
    estimate = run_estimate(cfg, layout, plan)
    where = f"launcher.min_nodes={cfg.launcher.min_nodes} lets the job start with {counts[0]} nodes, where "
    where += f"{text} of launcher.fallbacks is used and " if text else ""
    check_memory(estimate, layout, where if counts[0] < nodes else "")
    return Choice(text, cfg, tuple(counts), layout, estimate)


def _refuse_fewest(cfg: Config, fewest: int, others: list[int]) -> None:
    """Slurm could start the job with nodes that no layout fits. `others` are the larger numbers that have one."""
    ranks = fewest * cfg.launcher.ranks_per_node
    try:
        validate(cfg, ranks)
    except ConfigError as error:
        raise ConfigError(
            f"launcher.min_nodes={fewest} lets the job start with {fewest} nodes, but {error.cause}",
            f"use launcher.min_nodes={others[0]} (layouts fit {shown(others)} nodes), or add one of {ranks} ranks to "
            "launcher.fallbacks, such as {parallel:{dp:2,ep:2}}",
        ) from error


def _never_taken(text: str, cfg: Config, fewest: int, nodes: int) -> ConfigError:
    """Why the job takes no layout `text` on `fewest` to `nodes` nodes, as an error."""
    each = cfg.launcher.ranks_per_node
    subject = f"launcher.fallbacks has {text}, which"
    fits = [count for count in range(1, nodes + 1) if fit(cfg, count * each)]
    if smaller := [count for count in fits if count < fewest]:
        least = f"launcher.min_nodes={fewest}" if cfg.launcher.min_nodes else f"{nodes} without launcher.min_nodes"
        return ConfigError(
            f"{subject} fits {smaller[-1]} nodes, and the job never has fewer than {least}",
            f"set launcher.min_nodes={smaller[-1]}, or leave it out",
        )
    if fits:
        return ConfigError(
            f"{subject} is never taken: on {fits[0]} nodes the layout before it fits",
            "put it first, or give the one before it a parallel.dp",
        )
    p = cfg.parallel
    needed = p.tp * p.pp * p.cp * p.dp if p.dp else 0
    if needed and needed % each:
        return ConfigError(f"{subject} needs {needed} ranks, and nodes have {each}", f"use a multiple of {each} ranks")
    if needed > nodes * each:
        return ConfigError(
            f"{subject} needs {needed // each} nodes, and the job never has more than {nodes}",
            f"set launcher.nodes={needed // each}, or leave it out",
        )
    try:
        validate(cfg, needed or nodes * each)
    except ConfigError as error:
        return ConfigError(f"{subject} cannot be used: {error.cause}", error.remedy)
    return ConfigError(f"{subject} fits no number of nodes from 1 to {nodes}", "correct it, or leave it out")
