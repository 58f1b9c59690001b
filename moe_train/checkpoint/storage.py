"""Writes and reads sharded tensors in Megatron-Core's distributed format, with tensors only and nothing pickled.

Where this differs from `megatron.core.dist_checkpointing.save` and `load`:

* Its writer starts processes for every rank, which costs seconds of imports and leaves them behind when a run is killed
  (strategies/filesystem_async.py `_get_write_results_queue`). Here the rank itself writes.
* Its `load` unpickles the non-tensor part without restriction (0.19: serialization.py `load_common_state_dict`, through
  torch's `DefaultLoadPlanner.load_bytes`). Here that part is empty and never read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint

StateDict = dict[str, Any]


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron-Core's `torch_dist` format, written by the rank itself instead of by new processes."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: StateDict, checkpoint_dir: str | Path) -> None:
        """Write this rank's share. Every rank calls it; the first also writes the table of contents."""
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(shards),
            # With more threads torch loses the errors of all but the first: a full disk would go unnoticed.
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def write(state: StateDict, directory: Path) -> None:
    """Write the sharded tensors of `state` to the empty `directory`. Every rank calls it with its own shards.

    Data-parallel ranks hold the same tensors; each of them writes a part.
    """
    tensors, _ = extract_sharded_tensors_and_factories(state)
    strategy = InProcessSave()
    group = ps.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    dist_checkpointing.save(tensors, str(directory), strategy)


class Request:
    """The sharded tensors that a rank wants from a checkpoint, in the structure of its state dict."""

    def __init__(self, state: StateDict) -> None:
        tensors, _ = extract_sharded_tensors_and_factories(state)
        self._state, _, self._factories = load_preprocess(tensors)

    @property
    def tensors(self) -> list[ShardedTensor]:
        """Every wanted shard. Their keys may be changed before `read`."""
        return list(nested_values(self._state))

    def fill(self, read: Callable[[ShardedTensor], Tensor]) -> StateDict:
        """Plain tensors in the place of the sharded ones, each what `read` returns for it."""
        filled: StateDict = dict_list_map_outplace(read, self._state)
        return apply_factory_merges(filled, self._factories)

    def read(self, directory: Path) -> StateDict:
        """Plain tensors in the place of the sharded ones, read into their own memory where they have any."""
        loaded: StateDict = {}
        with warnings.catch_warnings():  # Megatron-Core 0.19 calls torch in a way that torch warns about
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
            merge(loaded, TorchDistLoadShardedStrategy().load(self._state, directory))
        return apply_factory_merges(loaded, self._factories)
