"""`moe-memory`: predicted memory of one rank per pipeline stage, from the configuration alone.

    moe-memory model=deepseek_v3 parallel=deepseek_v3_h800 recompute=deepseek_v3
    moe-memory model=qwen3_30b_a3b parallel.ep=8 precision=bf16 cluster=h100
    moe-memory model=qwen3_30b_a3b engine.context_length=16k

A second table counts the KV cache at inference: how many tokens and sequences fit next to the weights, by its format.
The command takes the overrides of `moe-train`, and engine.*. The defaults are GPUs with Transformer Engine
(runtime=cuda), BF16 (precision=bf16) and, without an experiment, sequences of 4,096 tokens in DeepSeek-V3's global
batch (train.seq_length=4096 batch=large).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import yaml
from rich.table import Table

from moe_train.config.assumed import names_of, on_gpus
from moe_train.config.cluster import ClusterConfig
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.composition.validate import validate
from moe_train.config.roots import MemoryRoot
from moe_train.config.schema import Config
from moe_train.model.memory import weights_of, workload_of
from parallel.layout import ParallelLayout
from parallel.planner.estimate import stage_memories
from parallel.planner.memory import StageMemory
from tools import kv_cache, terminal
from tools.words import CommandLine, parse

GIB, MIB = 2**30, 2**20
PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "recompute": "recomputed",
    "communication": "communication",
    "logits": "logits",
    "total": "total",
}

_COMMON = ("model", "parallel", "precision", "recompute", "cluster", "experiment", "train.seq_length",
          "batch.micro_batch_size", "parallel.tp", "parallel.pp", "parallel.ep", "parallel.dp",
          "engine.context_length", "engine.cache_format")  # fmt: skip


def main() -> None:
    """Console script."""
    words = with_defaults(sys.argv[1:])
    sys.exit(
        hydra_entry(run, argv=words, root=MemoryRoot, trains=False, runs=False, about=__doc__, common=_COMMON)
    )  # fmt: skip


def with_defaults(words: Sequence[str]) -> list[str]:
    """The command line, with what `moe-memory` assumes where it says nothing."""
    line = parse(words)
    assume(line)
    return line.argv()


def assume(line: CommandLine) -> None:
    """Put before the overrides what `moe-memory` and `moe-plan` assume where these say nothing."""
    given = names_of(line.overrides)
    added = on_gpus(line.overrides)
    if "experiment" not in given:
        if not given & {"batch", "batch.global_batch_size"}:
            added.append("batch=large")
        if "train.seq_length" not in given:
            added.append("train.seq_length=4096")
    line.overrides[:0] = added


def run(cfg: MemoryRoot) -> None:
    """Print the table and what it fits, and the KV cache at inference.

    Raises:
        ConfigError: the configuration is impossible.
    """
    layout = validate(cfg, trains=False)
    kv_cache.check(cfg)
    workload = workload_of(cfg, layout)
    weights = weights_of(cfg.model, workload)
    stages = stage_memories(workload, weights)
    console = terminal.console()
    title, rows = table(cfg, layout, shown(stages))
    console.print(title, soft_wrap=True)
    console.print(rows)
    console.print(verdict(stages, cfg.cluster, fp8=cfg.precision.fp8 is not None), soft_wrap=True)
    cache = kv_cache.answer(cfg, workload, weights)
    console.print(kv_cache.headline(cache), soft_wrap=True)
    console.print(kv_cache.table(cache, cfg.precision.dtype))


def shown(stages: Sequence[StageMemory]) -> list[StageMemory]:
    """All of a few stages; of many the first, the one with the highest memory in between, and the last."""
    if len(stages) <= 4:
        return list(stages)
    return [stages[0], max(stages[1:-1], key=lambda stage: stage.total), stages[-1]]


def table(
    cfg: Config,
    layout: ParallelLayout,
    stages: Sequence[StageMemory],
    more: Mapping[str, Sequence[float]] | None = None,
) -> tuple[str, Table]:
    """A title with the unit, and a column for each stage; `more` are further rows, in bytes."""
    unit, name = (GIB, "GiB") if max(stage.total for stage in stages) >= GIB else (MIB, "MiB")
    title = (
        f"{cfg.model.name}, {layout.world_size:,} ranks, {cfg.precision.name}, micro-batches of "
        f"{cfg.batch.micro_batch_size} x {cfg.train.seq_length:,} tokens: {name} of one rank"
    )

    def as_text(size: float) -> str:
        return f"{size / unit:,.2f}"

    result = Table()
    result.add_column("")
    for stage in stages:
        result.add_column(f"stage {stage.stage}", justify="right")
    result.add_row("holds", *(" ".join(_short(items) for items in stage.items) for stage in stages))
    result.add_row("micro-batches in flight", *(str(stage.micro_batches_in_flight) for stage in stages))
    result.add_row("activations of each", *(as_text(stage.activations_per_micro_batch) for stage in stages))
    result.add_row("of which by expert tokens", *(as_text(stage.expert_share) for stage in stages), end_section=True)
    for name, text in PARTS.items():
        if name == "total":
            result.add_section()
        result.add_row(text, *(as_text(getattr(stage, name)) for stage in stages))
    for text, sizes in (more or {}).items():
        result.add_row(text, *map(as_text, sizes))
    return title, result


def _short(items: str) -> str:
    """Ettt as Et*3."""
    text = ""
    for item in dict.fromkeys(items):
        count = items.count(item)
        text += item if count == 1 else f"{item}*{count}"
    return text


def gpus() -> dict[str, ClusterConfig]:
    """The GPU clusters of conf/cluster, by name."""
    files = sorted((CONF_DIR / "cluster").glob("*.yaml"))
    clusters = {file.stem: ClusterConfig(**yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files}
    return {name: cluster for name, cluster in clusters.items() if cluster.gpu != "CPU core"}


def verdict(stages: Sequence[StageMemory], chosen: ClusterConfig, *, fp8: bool) -> str:
    """The peak stage, whether it fits the GPUs of the chosen cluster, and the smallest GPU that it fits.

    Args:
        fp8: only GPUs with FP8 count, those whose FP8 peak is above the BF16 peak.
    """
    peak = max(stages, key=lambda stage: stage.total)
    size, usable = peak.total / GIB, chosen.memory_gib - chosen.reserved_gib
    judged = ""
    if size > usable:
        judged = f"more than the {usable:g} GiB that torch gets of the {chosen.memory_gib:g} of cluster={chosen.name}; "
    able = {name: gpu for name, gpu in gpus().items() if not fp8 or gpu.fp8_tflops > gpu.bf16_tflops}
    fits = {name: gpu.memory_gib for name, gpu in able.items() if size <= gpu.memory_gib - gpu.reserved_gib}
    which = "more than any GPU in conf/cluster has: split it further"
    if fits:
        least = min(fits.values())
        names = ", ".join(name for name, memory in fits.items() if memory == least)
        which = f"every stage fits a GPU of {least:g} GiB (cluster={names})"
    return f"peak: stage {peak.stage} of {len(stages)} with {size:,.2f} GiB; {judged}{which}"


if __name__ == "__main__":
    main()
