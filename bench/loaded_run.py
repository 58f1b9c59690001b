"""The model of a run for benchmarks of its generation, on one rank in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.step_data import free_port

if TYPE_CHECKING:
    from moe_train.inference.loading import LoadedModel


def load(run_dir: Path, dtype: str, threads: int) -> LoadedModel:
    """The weights of the newest checkpoint, in `dtype`. A process can load one model."""
    from moe_train.config.composition.compose import compose
    from moe_train.config.roots import GenerateRoot
    from moe_train.inference import loading, source
    from parallel.rank_info import RankInfo
    from parallel.runtime.threads import use_threads

    use_threads(threads)
    words = [f"precision={dtype}"]
    cfg = source.config_of(source.find(run_dir), compose(words, GenerateRoot), words)
    return loading.load(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", free_port(), "local"))
