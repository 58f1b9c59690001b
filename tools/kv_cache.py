"""The KV cache in the answers of `moe-memory` and `moe-plan`: which formats leave room for how many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from moe_train.config.inference import PlannedEngineConfig
from moe_train.config.model import ModelConfig
from moe_train.config.roots import MemoryRoot
from parallel.architecture.attention import attention_kind
from parallel.architecture.kv_cache import CACHE_FORMATS
from parallel.planner.hardware import Hardware
from parallel.planner.kv_cache import (
    CacheFit,
    Serving,
    StageRoom,
    fits,
    limiting,
    rooms,
    uncompressed_bytes_per_token,
)
from parallel.planner.memory import Weights
from parallel.planner.workload import Workload
from parallel.suggest import Impossible

GIB = 2**30


@dataclass(frozen=True)
class CacheAnswer:
    """The KV cache of a model in a layout, at inference.

    Args:
        room: of the stage that limits the number of tokens.
        stages: of the pipeline.
        replicas: data-parallel ones, each with as many tokens.
        uncompressed: bytes of keys and values of all heads of a token in the precision of the model; None where the
            cache holds these anyway.
    """

    serving: Serving
    room: StageRoom
    stages: int
    replicas: int
    rows: Sequence[CacheFit]
    uncompressed: int | None


def check(cfg: MemoryRoot) -> None:
    """Raise ConfigError where a field of `engine` does not go with the model."""
    model, asked = cfg.model, cfg.engine
    longest = model.max_position_embeddings
    if asked.context_length is not None and asked.context_length > longest:
        raise Impossible(
            f"engine.context_length={asked.context_length} exceeds model.max_position_embeddings={longest}",
            [{"engine.context_length": longest}, {"model.max_position_embeddings": asked.context_length}],
        )
    if asked.speculate and not model.mtp_num_layers:
        raise Impossible(
            "engine.speculate=true, but model.mtp_num_layers=0", [{"engine.speculate": False}]
        )  # fmt: skip
    if asked.rotary_format and not attention_kind(model).latent:
        raise Impossible(
            f"engine.rotary_format={asked.rotary_format} has no effect with model.attention={model.attention}",
            [{"engine.rotary_format": None}],
        )


def answer(cfg: MemoryRoot, workload: Workload, weights: Sequence[Weights]) -> CacheAnswer:
    """What fits `cfg.cluster`, in the layout and the precision of `workload`."""
    model, asked = cfg.model, cfg.engine
    serving = serving_of(asked, model, cfg.train.seq_length)
    found = rooms(workload, weights, Hardware.of(cfg.cluster).usable_bytes, serving)
    formats = [asked.cache_format] if asked.cache_format else list(CACHE_FORMATS)
    return CacheAnswer(
        serving=serving,
        room=limiting(found),
        stages=len(found),
        replicas=workload.layout.dp,
        rows=fits(model, workload.layout.tp, found, serving, formats, asked.rotary_format),
        uncompressed=uncompressed_bytes_per_token(model, workload.element) if attention_kind(model).latent else None,
    )


def serving_of(asked: PlannedEngineConfig, model: ModelConfig, seq_length: int) -> Serving:
    """Sizes of what is generated at the same time."""
    speculates = asked.speculate
    return Serving(
        context_length=asked.context_length or seq_length,
        batch_tokens=asked.max_batch_tokens,
        sequences=asked.max_sequences,
        block_size=asked.block_size,
        draft_depths=model.mtp_num_layers if speculates else 0,
    )


def headline(found: CacheAnswer) -> str:
    """Which stage limits the number of tokens, and what its memory is spent on."""
    room, length = found.room, found.serving.context_length
    free = f"{room.free / GIB:,.2f} GiB are free" if room.free >= 0 else f"{-room.free / GIB:,.2f} GiB are missing"
    replicas = f". The table is for one of {found.replicas:,} replicas" if found.replicas > 1 else ""
    return (
        f"KV cache at inference, sequences of {length:,} tokens. Stage {room.stage} of {found.stages} limits it: of "
        f"{room.usable / GIB:,.2f} GiB on a rank, weights take {room.weights / GIB:,.2f} and a forward pass of "
        f"{found.serving.batch_tokens:,} tokens {room.forward / GIB:,.2f}; {free}{replicas}"
    )


def table(found: CacheAnswer, dtype: str) -> Table:
    """A row for each format: what fits next to the model on the ranks of one replica."""
    result = Table()
    for column in ("format", "bytes a token", "of one rank", "tokens", "sequences"):
        result.add_column(column, justify="left" if column == "format" else "right")
    for row in found.rows:
        result.add_row(
            row.cache_format, f"{row.bytes_per_token:,}", f"{row.rank_bytes_per_token:,}", f"{row.tokens:,}",
            f"{row.sequences:,}",
        )  # fmt: skip
    if found.uncompressed:
        result.add_row(f"{dtype}, all heads", f"{found.uncompressed:,}", "", "", "")
    return result


def as_json(found: CacheAnswer) -> dict[str, Any]:
    """Every figure, in bytes and tokens."""
    room = found.room
    return {
        **asdict(found.serving),
        "replicas": found.replicas,
        "limiting_stage": room.stage,
        "usable_bytes": room.usable,
        "weight_bytes": room.weights,
        "forward_bytes": room.forward,
        "free_bytes": room.free,
        "uncompressed_bytes_per_token": found.uncompressed,
        "formats": [asdict(row) for row in found.rows],
    }
