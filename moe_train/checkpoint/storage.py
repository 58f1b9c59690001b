"""Writes and reads sharded tensors in Megatron-Core's distributed format, with tensors only and nothing pickled.

Where this differs from `megatron.core.dist_checkpointing.save` and `load`:

* Its writer starts processes for every rank, which costs seconds of imports and leaves them behind when a run is killed
  (strategies/filesystem_async.py `_get_write_results_queue`). Here ranks agree on a plan, and each writes its share
  itself: in a thread, for which `Share` needs no other rank.
* It puts what is not a tensor on disk before ranks agree on anything: with a full disk the first rank leaves, and the
  others wait for it.
* Its `load` unpickles the non-tensor part without restriction (0.19: serialization.py `load_common_state_dict`, through
  torch's `DefaultLoadPlanner.load_bytes`). Here that part is empty and never read.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from moe_train.formats.hashing_file import HashingFile
from moe_train.formats.manifest import Entry
from parallel.errors import CheckpointError

StateDict = dict[str, Any]

_COMMON = "common.pt"
_ITEM_BYTES = 2048
"""More than torch.save adds to the numbers of a tensor."""


class _Plan:
    """A save strategy for Megatron-Core that only decides which rank writes what.

    That is nearly always what it was for the last checkpoint, and to gather it takes longer the more ranks there are.
    """

    backend, version = "torch_dist", 1
    last: ClassVar[tuple[int, SavePlan, Metadata | None] | None] = None
    """Number of ranks, this one's part, and on the first rank the table of contents."""

    def __init__(self) -> None:
        self.items: list[tuple[MetadataIndex, Tensor]] = []
        self.table: Metadata | None = None

    def save(self, sharded_state_dict: StateDict, checkpoint_dir: str | Path) -> None:
        """Note this rank's share, and on the first rank also the table of contents. Every rank calls it."""
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)

        def local() -> SavePlan:
            planner.set_up_planner(mcore_to_pyt_state_dict(shards), is_coordinator=dist.get_rank() == 0)
            return planner.create_local_plan()

        def together(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self.table = planner.create_global_plan(plans)
            return plans

        last, ranks, own = _Plan.last, dist.get_world_size(), None
        if last is not None and last[0] == ranks:
            with suppress(Exception):  # which comes again below, where every rank hears of it
                own = local()
        same = [False] * ranks
        dist.all_gather_object(same, last is not None and own == last[1])
        if last is not None and all(same):
            plan, self.table = last[1:]
        else:
            plan = _DistWrapper(None, True, 0).reduce_scatter("plan", lambda: own or local(), together)
        _Plan.last = ranks, plan, self.table
        planner.finish_plan(plan)
        self.items = [(item.index, planner.resolve_data(item)) for item in plan.items]


@dataclass(frozen=True)
class Written:
    """What a rank has put on disk."""

    items: list[WriteResult]
    files: dict[str, Entry]


class _File(HashingFile):
    """The file that `torch.save` writes to, until a stop is requested."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path)
        self._stop = stop

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise CheckpointError("the run ended before the checkpoint was written")
        return super().write(data)


class _TableWriter(FileSystemWriter):
    """Writes a table of contents that every version of Python can read.

    Upstream notes the directory as a `Path`, whose class has another module in Python 3.13 than in others.
    """

    def storage_meta(self) -> StorageMeta | None:
        return None


@dataclass(frozen=True)
class Share:
    """The parts of tensors that this rank writes, all in one file, and on the first rank the table of contents."""

    file: str
    items: list[tuple[MetadataIndex, Tensor]]
    table: Metadata | None

    @property
    def bytes(self) -> int:
        """At most what `write` needs on disk."""
        return sum(tensor.nbytes + _ITEM_BYTES for _, tensor in self.items)

    def copied(self, unshared: Collection[int]) -> Share:
        """The same numbers in host memory that training does not touch.

        `unshared` are addresses of memory that nobody else uses: tensors there stay where they fill most of it.
        """
        used: Counter[int] = Counter()
        for _, tensor in self.items:
            used[tensor.untyped_storage().data_ptr()] += tensor.nbytes

        def copy(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            if not tensor.is_cpu:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            if memory.data_ptr() in unshared and 2 * used[memory.data_ptr()] >= memory.nbytes():
                return tensor
            return tensor.clone(memory_format=torch.contiguous_format)

        items = [(index, copy(tensor)) for index, tensor in self.items]
        if any(not tensor.is_cpu for _, tensor in self.items):
            torch.cuda.synchronize()
        return replace(self, items=items)

    def write(self, directory: Path, stop: threading.Event) -> Written:
        """Write the file; it is on disk on return. Needs no other rank, and ends early when `stop` is set.

        Raises:
            OSError: the disk is full or not writable.
        """
        if not self.items:
            return Written([], {})
        file, results = _File(directory / self.file, stop), []
        try:
            for index, tensor in self.items:
                start, numbers = file.position, tensor.detach().cpu()
                if numbers.untyped_storage().nbytes() != numbers.nbytes:
                    numbers = numbers.clone()  # torch.save writes all of the memory that a view looks at
                torch.save(numbers, cast(IO[bytes], file))
                size = file.position - start
                results.append(WriteResult(index, size, _StorageInfo(self.file, start, size)))
            file.close()
        except BaseException as error:
            file.abandon()
            raise (file.error or error) from None
        return Written(results, {self.file: Entry(file.position, file.sha256.hexdigest())})

    def write_table(self, directory: Path, written: Sequence[Written]) -> None:
        """Write the table of contents, on the first rank, from what every rank has `written`."""
        if self.table is None:
            raise RuntimeError("only the first rank has the table of contents")
        _TableWriter(directory).finish(self.table, [part.items for part in written])
        torch.save({}, directory / _COMMON)  # Megatron-Core takes a directory without it for no checkpoint
        save_config(CheckpointingConfig(_Plan.backend, _Plan.version), str(directory))


def share_of(state: StateDict) -> Share:
    """What this rank is to write of the tensors of all ranks, of which `state` has its own. Every rank calls it.

    Data-parallel ranks hold the same tensors; each of them writes a part.
    """
    tensors, _ = extract_sharded_tensors_and_factories(state)
    tensors, _ = save_preprocess(tensors)
    plan = _Plan()
    group = ps.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(plan, group) if group.size() > 1 else plan
    strategy.save(tensors, "")
    return Share(f"__{dist.get_rank()}_0.distcp", plan.items, plan.table)


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
        """Plain tensors instead of the sharded ones, each what `read` returns for it."""
        filled: StateDict = dict_list_map_outplace(read, self._state)
        return apply_factory_merges(filled, self._factories)

    def read(self, directory: Path) -> StateDict:
        """Plain tensors instead of the sharded ones, read into their own memory where they have any."""
        loaded: StateDict = {}
        with warnings.catch_warnings():  # Megatron-Core 0.19 calls torch in a way that torch warns about
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
            merge(loaded, TorchDistLoadShardedStrategy().load(self._state, directory))
        return apply_factory_merges(loaded, self._factories)
