"""`runtime=simulated`: build one rank of a job of any size in this process, without memory for its tensors."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moe_train.config.composition.validate import validate
from moe_train.config.resolve import resolve
from moe_train.config.schema import Config
from moe_train.model import arithmetic, backend
from moe_train.model.build import build, pipeline_layout, transformer_config
from parallel import groups, pipeline, runtime
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo


def run(cfg: Config) -> None:
    """Print what rank `cfg.rank` of the layout holds.

    Raises:
        ConfigError: the layout or the rank is impossible.
    """
    start = time.monotonic()
    layout = validate(cfg)
    counts = build_rank(cfg, layout, cfg.rank)
    where, whole = layout.coordinates(cfg.rank), arithmetic.count_parameters(cfg.model)
    table = Table(title=f"{cfg.model.name}: rank {cfg.rank} of {layout.world_size:,}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row(
        "position", " ".join(f"{k}={getattr(where, k)}" for k in ("pp", "dp", "cp", "tp", "ep", "etp", "edp"))
    )
    table.add_row("stages", " | ".join("".join(items) for items in stages(cfg, layout)[where.pp :: layout.pp]))
    table.add_row("parameters of this rank", f"{counts.shared + counts.experts:,}")
    table.add_row("of which routed experts", f"{counts.experts:,}")
    table.add_row("whole model, without multi-token prediction", f"{whole.total:,}")
    table.add_row("whole model, with it", f"{whole.total_with_mtp:,}")
    table.add_row("time to build", f"{time.monotonic() - start:.1f} s")
    Console().print(table)


@dataclass(frozen=True)
class Held:
    """Parameters on one rank: outside and inside routed experts, and how many of the former copy another rank's."""

    shared: int
    experts: int
    embedding_copy: int
    expert_bias: int


def build_rank(cfg: Config, layout: ParallelLayout, rank: int) -> Held:
    """Build `rank` of `layout` with Megatron-Core, count what it holds, and forget it again."""
    backend.choose(cfg, "simulated")
    resolved = resolve(cfg, layout, runtime="simulated")
    info = RankInfo(rank, layout.world_size, 0, 1, "", 0, "simulated")
    runtime.start("simulated", info, cfg.launcher.timeout_s)
    groups.create(layout, cfg.seed)
    config = transformer_config(resolved, layout.coordinates(rank).pp)
    chunks = build(cfg, config, resolved.backend, layout.vpp, weights=False)
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    bias = sum(b.numel() for c in chunks for name, b in c.named_buffers() if name.endswith("expert_bias"))
    groups.destroy()
    dist.destroy_process_group()
    total = sum(p.numel() for _, p in named)
    experts = sum(p.numel() for name, p in named if ".experts." in name)
    # Upstream gives the stage of the multi-token-prediction layers its own copy of the embedding.
    embeddings = [p.numel() for name, p in named if "word_embeddings" in name]
    copies = embeddings[layout.coordinates(rank).pp == 0 :] if layout.pp > 1 else []
    return Held(total - experts, experts, sum(copies), bias)


def stages(cfg: Config, layout: ParallelLayout) -> list[list[str]]:
    """Items (E embedding, t layer, m prediction depth, L loss) of each of the pp x vpp stages."""
    text = pipeline_layout(cfg, layout)
    if text is None:
        return arithmetic.single_stage(cfg.model)
    return pipeline.parse_layout(text, layout.pp, layout.vpp, cfg.model.num_layers, cfg.model.mtp_num_layers)
