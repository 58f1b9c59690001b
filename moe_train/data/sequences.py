"""Megatron-Core's GPT dataset with a check that the model has an embedding for every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

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
