"""Which engine runs a model: that of the local backend, or Megatron-Core's with Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moe_train.inference import dynamic_engine, engine
from moe_train.inference.base_engine import BaseEngine
from moe_train.ranks import RankContext
from parallel.errors import ConfigError


def unsupported(ranks: RankContext) -> ConfigError | None:
    """Why the engine of the backend cannot run a model of this config; None if it can."""
    module = dynamic_engine if ranks.backend == "te" else engine
    return module.unsupported(ranks)


def least_block_size(ranks: RankContext) -> int:
    """Tokens of a block of the cache: the engine of the backend takes multiples of it."""
    return dynamic_engine.BLOCK_SIZE if ranks.backend == "te" else 1


def open_engine(ranks: RankContext, chunks: Sequence[nn.Module], options: engine.EngineOptions) -> BaseEngine:
    """The engine of the backend, which is to be used as a context manager. Every rank calls it.

    Raises:
        ConfigError: the engine cannot run the model, or lacks one of the options.
    """
    kind = dynamic_engine.DynamicEngine if ranks.backend == "te" else engine.Engine
    return kind(ranks, chunks, options)
