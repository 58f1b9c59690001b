"""A trained model on the ranks that run it, without an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn

from moe_train.checkpoint import weights
from moe_train.config.inference import EngineConfig
from moe_train.config.schema import Config
from moe_train.data.tokenizer import Tokenizer
from moe_train.inference import source
from moe_train.inference.engine import EngineOptions
from moe_train.ranks import RankContext, build_model, setup_ranks
from parallel.architecture.kv_cache import bytes_per_token
from parallel.errors import ConfigError
from parallel.rank_info import RankInfo

_FREE_SHARE = 0.25  # of the free memory, for a KV cache of a size that nothing sets


@dataclass(frozen=True)
class LoadedModel:
    """This rank's part of a model.

    Args:
        chunks: one a virtual pipeline stage, with the weights and without DDP.
    """

    ranks: RankContext
    chunks: list[nn.Module]
    tokenizer: Tokenizer

    @property
    def cfg(self) -> Config:
        """The config that `source.config_of` made."""
        return self.ranks.cfg


def load(cfg: Config, rank: RankInfo) -> LoadedModel:
    """Join the other ranks, and read the weights at `cfg.init_from`. Every rank calls it.

    Args:
        cfg: from `source.config_of`.

    Raises:
        ConfigError, HardwareError: the layout or the machine does not fit.
        CheckpointError: the weights are missing, damaged, or of another model.
        DataError: the tokenizer is damaged or does not fit.
    """
    tokenizer = source.load_tokenizer(cfg)
    ranks = setup_ranks(cfg, rank)
    chunks = build_model(ranks)
    with source.own_remedy("source"):
        weights.load(ranks, chunks, Path(str(cfg.init_from)), "source")
    return LoadedModel(ranks, chunks, tokenizer)


def engine_options(ranks: RankContext, config: EngineConfig, longest: int | None = None) -> EngineOptions:
    """The options of an engine, with a size of the KV cache that all ranks can have. Every rank calls it.

    Args:
        longest: tokens of the longest sequence that will come; None: what the model allows.

    Raises:
        ConfigError: engine.memory_gib is less than one block.
    """
    blocks = config.num_blocks or _blocks_of_memory(ranks, config, longest)
    if ranks.layout.world_size > 1:
        fewest = torch.tensor(blocks, device=ranks.device)
        dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
        blocks = int(fewest)
    return EngineOptions(
        blocks, config.block_size, config.max_batch_tokens, config.max_sequences, config.cache_format,
        config.rotary_format, speculate=_speculates(ranks, config),
    )  # fmt: skip


def _speculates(ranks: RankContext, config: EngineConfig) -> bool:
    if config.speculate and not ranks.cfg.model.mtp_num_layers:
        raise ConfigError(
            "engine.speculate=true, but the model has no multi-token-prediction layers",
            "set engine.speculate=false, or leave it out",
        )
    return config.speculate


def _blocks_of_memory(ranks: RankContext, config: EngineConfig, longest: int | None) -> int:
    model, layout = ranks.cfg.model, ranks.layout
    form = config.cache_format or ranks.cfg.precision.dtype
    # Of a stage with more layers than others, at most.
    layers = -(-model.num_layers // layout.pp) + (model.mtp_num_layers if _speculates(ranks, config) else 0)
    per_token = bytes_per_token(model, form, config.rotary_format, layout.tp) / model.num_layers * layers
    per_block = per_token * config.block_size
    if config.memory_gib is not None:
        blocks = int(config.memory_gib * 2**30 / per_block)
        if blocks < 1:
            raise ConfigError(
                f"engine.memory_gib={config.memory_gib:g} is less than one block of {config.block_size} tokens: "
                f"{config.block_size} x {per_token:,.0f} bytes",
                f"set engine.memory_gib={1.01 * per_block / 2**30:.2g} or more",
            )
        return blocks
    tokens = min(model.max_position_embeddings, longest or model.max_position_embeddings)
    wanted = config.max_sequences * -(-tokens // config.block_size)
    return max(1, min(wanted, int(_FREE_SHARE * _free_bytes(ranks) / per_block)))


def _free_bytes(ranks: RankContext) -> int:
    """Memory of the device that this rank can take."""
    if ranks.runtime == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available // ranks.rank.local_world_size)
