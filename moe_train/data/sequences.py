"""Megatron-Core's GPT dataset with a check that the model has an embedding for every token, and an order by epochs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from moe_train.files import atomic
from parallel.errors import DataError


@dataclass
class SequencesConfig(GPTDatasetConfig):
    """What `Sequences` needs beyond Megatron-Core's own settings.

    Attributes:
        model_vocab_size: token ids are below this. It counts no rows that only pad the embedding.
        tokenizer_path: the tokenizer that the datasets should be made with, for the remedy of an error.
    """

    model_vocab_size: int = 0
    tokenizer_path: str = ""


class Sequences(GPTDataset):
    """Sequences of one .bin/.idx pair.

    Without the check, an id above the vocabulary ends one rank with an IndexError, and with tp > 1 it is embedded as
    zeros and trained on.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Sample `idx`, as `GPTDataset` gives it.

        Raises:
            DataError: it has a token id outside the vocabulary; the text names the file, the document and the id.
        """
        sample: dict[str, Any] = super().__getitem__(idx)
        # The labels are the tokens from the second one on and one more.
        low, high = torch.aminmax(torch.stack([sample["tokens"], sample["labels"]]))
        if low < 0 or high >= self.config.model_vocab_size:
            raise self._out_of_range(0 if idx is None else idx)
        return sample

    def _out_of_range(self, idx: int) -> DataError:
        size, tokenizer = self.config.model_vocab_size, self.config.tokenizer_path
        for document, start, ids in self._parts(idx):
            wrong = np.flatnonzero((ids < 0) | (ids >= size))
            if len(wrong):
                position = start + int(wrong[0])
                index = self.dataset.index
                in_file = int(index.sequence_pointers[document]) // index.dtype_size + position
                return DataError(
                    f"{self.dataset_path}.bin has token id {int(ids[wrong[0]])} at position {position} of document "
                    f"{document} (token {in_file} of the file), but model.vocab_size={size}",
                    f"copy the file again if it is damaged, or make it with {tokenizer}",
                )
        raise RuntimeError(f"sample {idx} of {self.dataset_path} has changed while it was read")

    def _parts(self, idx: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(document, position of the first token in it, token ids) of each document that sample `idx` is cut from."""
        shuffled = self.shuffle_index[idx]
        (first, offset), (last, end) = (self.sample_index[i].tolist() for i in (shuffled, shuffled + 1))
        for i in range(first, last + 1):
            document, start = int(self.document_index[i]), offset if i == first else 0
            length = end + 1 - start if i == last else None  # with the one token more that the last label needs
            yield document, start, self.dataset.get(document, offset=start, length=length)


class EpochSequences(Sequences):
    """`Sequences` in an order that depends on the seed and the position only, not on how many are asked for.

    Each epoch shuffles documents and sequences for itself, and drops its last partial sequence. Upstream shuffles all
    epochs but the last together, so that a longer run draws other sequences from its first step on. The first epoch is
    as upstream orders a single one.
    """

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, sample and shuffle index, from files that rank 0 makes before others read.

        Returns:
            Document ids [epochs * documents]; (position in them, offset) where each sequence begins and, behind the
            last one of each epoch, where that ends [epochs * (sequences + 1), 2]; rows of it [epochs * sequences].
        """
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        cache = Path(self.config.path_to_cache)
        files = [cache / f"{base}-{name}_index.npy" for name in ("document", "sample", "shuffle")]
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        if is_main and not all(file.is_file() for file in files):
            for file, index in zip(files, self._build_epochs(), strict=True):
                with atomic.replacement(file) as temporary, temporary.open("xb") as out:
                    np.save(out, index)
        document, sample, shuffle = (np.load(file, mmap_mode="r") for file in files)
        return document, sample, shuffle

    def _build_epochs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length, tokens = self.config.sequence_length, self._get_num_tokens_per_epoch()
        per_epoch = (tokens - 1) // length  # the last label needs one token more
        epochs = -(-(self.num_samples or 1) // per_epoch)
        documents = len(self.indices)
        position = np.int32 if epochs * documents <= np.iinfo(np.int32).max else np.int64
        row = np.uint32 if epochs * (per_epoch + 1) <= np.iinfo(np.uint32).max else np.int64
        document_index = np.empty((epochs, documents), np.int32)
        sample_index = np.empty((epochs, per_epoch + 1, 2), position)
        shuffle_index = np.empty((epochs, per_epoch), row)
        lengths = self.dataset.sequence_lengths.copy()
        for epoch in range(epochs):
            random = np.random.RandomState([self.config.random_seed, epoch] if epoch else self.config.random_seed)
            document_index[epoch] = self.indices
            random.shuffle(document_index[epoch])
            sample_index[epoch] = helpers.build_sample_idx(lengths, document_index[epoch], length, 1, tokens)
            sample_index[epoch, :, 0] += epoch * documents
            order = np.arange(per_epoch, dtype=row)
            random.shuffle(order)
            shuffle_index[epoch] = epoch * (per_epoch + 1) + order
        return document_index.reshape(-1), sample_index.reshape(-1, 2), shuffle_index.reshape(-1)
