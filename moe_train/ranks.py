"""One process as a rank of a job: device, process groups, seeds, and its part of the model. No optimizer.

`train.build_trainer` makes a run of it. Evaluation, generation and reference models need no run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moe_train.config.composition.validate import validate
from moe_train.config.resolve import ResolvedConfig, resolve
from moe_train.config.schema import Config
from moe_train.model import backend
from moe_train.model.build import build, transformer_config
from moe_train.model.kernels import cpu_kernels
from moe_train.model.precision import DTYPES
from parallel import groups, runtime
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo


@dataclass
class RankContext:
    """What one rank computes with, apart from a model."""

    resolved: ResolvedConfig
    rank: RankInfo
    device: torch.device

    @property
    def cfg(self) -> Config:
        """The unresolved config; `resolved` has the values that it leaves to be derived."""
        return self.resolved.cfg

    @property
    def layout(self) -> ParallelLayout:
        """Degrees of every dimension of parallelism."""
        return self.resolved.layout

    @property
    def runtime(self) -> str:
        """cuda, cpu or simulated."""
        return self.resolved.runtime

    @property
    def backend(self) -> str:
        """te or local."""
        return self.resolved.backend

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and the terminal."""
        return self.rank.rank == 0

    def micro_batches_of(self, samples: int) -> int:
        """Forward passes of one data-parallel rank over a global batch of `samples`."""
        return samples // self.resolved.data_ranks_batch


def setup_ranks(cfg: Config, rank: RankInfo) -> RankContext:
    """Join the other ranks: runtime, process groups, seeds. Every rank of the job calls it with the same config.

    Raises:
        ConfigError, HardwareError: with a cause and a remedy.
    """
    layout = validate(cfg, rank.world_size)
    name = runtime.choose(cfg.runtime)
    backend.choose(cfg, name)
    device = runtime.start(name, rank, cfg.launcher.timeout_s)
    groups.create(layout, cfg.seed)
    torch.manual_seed(cfg.seed)
    if name == "cpu":
        for dtype in {DTYPES[cfg.precision.dtype], torch.float32}:  # emulated FP8 multiplies in fp32
            cpu_kernels.choose(dtype)
    return RankContext(resolve(cfg, layout, runtime=name), rank, device)


def build_model(ranks: RankContext) -> list[nn.Module]:
    """The model chunks of this rank, one a virtual pipeline stage, with the initial weights of `seed`.

    The chunks have the training precision. `checkpoint.weights.load` puts the weights of a checkpoint into them.
    """
    layout = ranks.layout
    config = transformer_config(ranks.resolved, layout.coordinates(ranks.rank.rank).pp)
    return build(ranks.cfg, config, ranks.backend, layout.vpp)
