"""Micro-batches of one data-parallel rank (Megatron-LM's `get_batch`), in an order that is the same for every layout
and can be resumed at any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moe_train.data import packing
from moe_train.schedules import BatchSchedule
from parallel.errors import DataError

Batch = dict[str, Tensor]


class BatchIterator:
    """Iterates over micro-batches of [micro_batch_size, sequence] tensors until the dataset has no whole global batch.

    A global batch of G samples from sample f on is samples f ... f + G - 1 for every layout. Micro-batch m of it takes,
    on data-parallel rank r of d, samples f + (m*d + r)*b ... + b - 1. The next global batch follows.

    Args:
        schedule: size of each global batch.
        start_sample: samples that all ranks together have used before.
        trained_samples: where the first batch is in the schedule. It may be less than `start_sample`: samples that were
            used and not trained count there alone.
        device: where batches go; None leaves them on the CPU.
        workers: processes that read ahead; 0 reads in this one. `close` ends them.
        wrap: whether to begin again with the first sample behind the last one, instead of ending.
        packed: whether micro-batches are one row each, in which documents are kept apart (`packing.pack`).

    Raises:
        ValueError: a global batch is not whole micro-batches on every rank.
        DataError: while iterating, where `dataset` raises one, also in a worker process.
    """

    def __init__(
        self, dataset: Dataset[Any], *, dp_rank: int, dp_size: int, micro_batch_size: int,
        schedule: BatchSchedule, start_sample: int = 0, trained_samples: int = 0, device: torch.device | None = None,
        workers: int = 0, wrap: bool = False, packed: bool = False,
    ) -> None:  # fmt: skip
        for size in schedule.sizes:
            if size % (micro_batch_size * dp_size):
                raise ValueError(f"{size} samples are not micro-batches of {micro_batch_size} on {dp_size} ranks")
        self.dataset, self.device, self.workers, self.wrap = dataset, device, workers, wrap
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.micro_batch_size, self.schedule = micro_batch_size, schedule
        self._collate = partial(_collate, packed=packed)
        self._consumed, self._trained = start_sample, trained_samples
        self._taken = 0  # micro-batches of the current global batch
        self._batches: Iterator[Batch | DataError] | None = None

    @property
    def consumed_samples(self) -> int:
        """Samples of the global batches that are finished, over all ranks, including those before the start."""
        return self._consumed

    def state_dict(self) -> dict[str, int]:
        """The position, equal on all ranks after a step. It fits another layout and another batch size too."""
        return {"consumed_samples": self._consumed, "trained_samples": self._trained}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the samples that `state` has consumed; batches read ahead are dropped."""
        self.close()
        self._consumed, self._trained = state["consumed_samples"], state["trained_samples"]

    def for_chunks(self, count: int) -> list[Iterator[Batch]]:
        """An iterator over the same micro-batches for each of `count` model chunks. Each is read once.

        Chunks of an interleaved pipeline take micro-batches at different times, and each takes all of a global batch.
        Micro-batches between the first chunk and the last one stay in memory.
        """
        if count == 1:
            return [self]
        queues: list[deque[Batch]] = [deque() for _ in range(count)]

        def batches(own: deque[Batch]) -> Iterator[Batch]:
            while True:
                if not own:
                    batch = next(self, None)
                    if batch is None:
                        return
                    for queue in queues:
                        queue.append(batch)
                yield own.popleft()

        return [batches(queue) for queue in queues]

    def close(self) -> None:
        """End the worker processes. The iterator continues with its unfinished global batch."""
        self._taken = 0
        self._batches = None  # torch ends the workers with the iterator that owns them

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._read_ahead() if self.workers else self._read()
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        self._count()
        if self.device is None:
            return batch
        return {
            name: tensor if name == packing.MAX_SEQLEN else tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
        }

    def _count(self) -> None:
        """One more micro-batch was taken; a global batch is consumed when its last one is."""
        self._taken += 1
        size = self.schedule.size_at(self._trained)
        if self._taken * self.micro_batch_size * self.dp_size == size:
            self._consumed, self._trained, self._taken = self._consumed + size, self._trained + size, 0

    def _indices(self) -> Iterator[list[int]]:
        size, first, trained = self.micro_batch_size, self._consumed, self._trained
        length = len(self.dataset)  # type: ignore[arg-type]
        while self.wrap or first + self.schedule.size_at(trained) <= length:
            batch_size = self.schedule.size_at(trained)
            for sample in range(self.dp_rank * size, batch_size, self.dp_size * size):
                yield [index % length for index in range(first + sample, first + sample + size)]
            first, trained = first + batch_size, trained + batch_size

    def _read(self) -> Iterator[Batch | DataError]:
        for indices in self._indices():
            yield self._collate([self.dataset[i] for i in indices])

    def _read_ahead(self) -> Iterator[Batch | DataError]:
        loader = DataLoader(
            _ErrorsAsSamples(self.dataset),
            collate_fn=self._collate,
            batch_sampler=self._indices(),
            num_workers=self.workers,
            # A rank's own default is how it was started itself: a worker would import torch and Megatron-Core again.
            # It only reads mapped files and never touches a device, so a fork is safe.
            multiprocessing_context="fork",
            pin_memory=self.device is not None and self.device.type == "cuda",
            generator=torch.Generator(),  # else each loader takes a number from the generator that training uses
        )
        return iter(loader)


class _ErrorsAsSamples(Dataset[Any]):
    """Hands typed errors on to the process that trains: torch makes RuntimeErrors with a traceback of them."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except DataError as error:
            return error


def _collate(samples: list[Any], packed: bool) -> Batch | DataError:
    """The tensors of samples, stacked; the first error where there is one.

    Other values are left out, such as `dataset_id` of a blend, a numpy integer without a sequence dimension.
    """
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    return packing.pack(batch) if packed else batch
