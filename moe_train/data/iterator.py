"""Micro-batches of one data-parallel rank, in an order that no layout changes and any step can resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from parallel.errors import DataError

Batch = dict[str, Tensor]


class BatchIterator:
    """Iterates over micro-batches of [micro_batch_size, sequence] tensors until the dataset has no whole global batch.

    Global batch k is samples k*G ... (k+1)*G - 1 for every layout. Micro-batch m of it takes, on data-parallel rank r
    of d, samples k*G + (m*d + r)*b ... + b - 1.

    Args:
        start_sample: samples that all ranks together have used before.
        device: where batches go; None leaves them on the CPU.
        workers: processes that read ahead; 0 reads in this one. `close` ends them.
        wrap: whether to begin again with the first sample behind the last one, instead of ending.

    Raises:
        ValueError: the global batch is not whole micro-batches on every rank.
        DataError: while iterating, where `dataset` raises one, also in a worker process.
    """

    def __init__(
        self, dataset: Dataset[Any], *, dp_rank: int, dp_size: int, micro_batch_size: int, global_batch_size: int,
        start_sample: int = 0, device: torch.device | None = None, workers: int = 0,
        wrap: bool = False,
    ) -> None:  # fmt: skip
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"{global_batch_size} samples are not micro-batches of {micro_batch_size} on {dp_size} ranks"
            )
        self.dataset, self.device, self.workers, self.wrap = dataset, device, workers, wrap
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self._start, self._taken = start_sample, 0
        self._batches: Iterator[Batch | DataError] | None = None

    @property
    def consumed_samples(self) -> int:
        """Samples of the global batches that are finished, over all ranks, including those before the start."""
        each = self.global_batch_size // (self.micro_batch_size * self.dp_size)
        return self._start + self._taken // each * self.global_batch_size

    def state_dict(self) -> dict[str, int]:
        """The position, equal on all ranks after a step. It fits another layout and another batch size too."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the samples that `state` has consumed; batches read ahead are dropped."""
        self.close()
        self._start, self._taken = state["consumed_samples"], 0

    def close(self) -> None:
        """End the worker processes. The iterator stays where it is and can go on."""
        self._start, self._taken = self.consumed_samples, 0
        self._batches = None  # torch ends the workers with the iterator that owns them

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._read_ahead() if self.workers else self._read()
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        self._taken += 1
        if self.device is None:
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _indices(self) -> Iterator[list[int]]:
        size, first = self.micro_batch_size, self._start
        length = len(self.dataset)  # type: ignore[arg-type]
        while self.wrap or first + self.global_batch_size <= length:
            for sample in range(self.dp_rank * size, self.global_batch_size, self.dp_size * size):
                yield [index % length for index in range(first + sample, first + sample + size)]
            first += self.global_batch_size

    def _read(self) -> Iterator[Batch | DataError]:
        for indices in self._indices():
            yield _collate([self.dataset[i] for i in indices])

    def _read_ahead(self) -> Iterator[Batch | DataError]:
        loader = DataLoader(
            _ErrorsAsSamples(self.dataset),
            collate_fn=_collate,
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


def _collate(samples: list[Any]) -> Batch | DataError:
    """The tensors of samples, stacked; the first error where there is one.

    Other values are left out, such as `dataset_id` of a blend, a numpy integer without a sequence dimension.
    """
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}
