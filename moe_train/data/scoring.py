"""Text whose every token is scored once: files, or a dataset that is already tokenised.

The tokens of a source follow one another, as in training, and are cut into sequences. Each sequence begins with the
last token of the one before, so that each token is a label once. An end-of-document token comes before the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import Dataset

from moe_train.config.schema import DataConfig
from moe_train.data import corpus
from moe_train.data.files import source_files
from moe_train.data.index_file import read_index
from moe_train.data.manifest import MANIFEST, PREFIX
from moe_train.data.report import Report
from moe_train.data.tokenizer import Tokenizer
from parallel.errors import DataError

SOURCE = "source"
"""Name in a batch: the number of the source of each token, int64 [b, s]."""

_PLAIN_TEXT = (".txt", ".md")
Sample = dict[str, Tensor]


@dataclass(frozen=True)
class ScoredText:
    """The tokens of one source.

    Args:
        tokens: ids [n], of all documents one after the other.
        lengths: tokens of each document.
        num_bytes: of its text in UTF-8; None where only decoding tells.
        eod: token that ends a document.
    """

    name: str
    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int | None
    eod: int

    def first(self, count: int) -> ScoredText:
        """The first `count` tokens."""
        if count >= len(self.tokens):
            return self
        ends = np.minimum(np.cumsum(self.lengths, dtype=np.int64), count)
        lengths = np.diff(ends, prepend=0)
        return ScoredText(self.name, self.tokens[:count], lengths[lengths > 0], None, self.eod)

    def count_bytes(self, tokenizer: Tokenizer) -> int:
        """UTF-8 bytes of its text. Where it has to be decoded this takes a second for some million tokens."""
        if self.num_bytes is not None:
            return self.num_bytes
        documents = np.split(self.tokens, np.cumsum(self.lengths, dtype=np.int64)[:-1])
        return sum(text_bytes(tokenizer, document) for document in documents)


def read(name: str, path: str, data: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> ScoredText:
    """The source at `path`: text files, a dataset of moe-data, or the prefix of a .bin/.idx pair.

    A plain text file is one document. What `data` says of records, encodings and special tokens holds; no document is
    left out as a duplicate or as too short.

    Args:
        vocab_size: of the model; token ids are below it.

    Raises:
        DataError: it is missing, damaged, empty, or has tokens that the model does not have.
    """
    prefix = _prefix(path)
    text = _indexed(name, prefix, tokenizer.eod) if prefix else _of_files(name, path, data, tokenizer)
    if len(text.tokens) == 0:
        raise DataError(f"{path} has no text", "name a file with text")
    low, high = int(text.tokens.min()), int(text.tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise DataError(
            f"{path} has token id {wrong}, but model.vocab_size={vocab_size}",
            "name a dataset that was made with the tokenizer of the model",
        )
    return text


def _prefix(path: str) -> str | None:
    """The prefix of a .bin/.idx pair that `path` names; None where it names text."""
    name = path.removesuffix(".idx").removesuffix(".bin")
    if Path(f"{name}.idx").is_file():
        return name
    directory = Path(path)
    return str(directory / PREFIX) if (directory / MANIFEST).is_file() else None


def _indexed(name: str, prefix: str, eod: int) -> ScoredText:
    if not Path(f"{prefix}.bin").is_file():
        raise DataError(f"{prefix}.bin is missing", f"copy it next to {prefix}.idx")
    lengths = np.array(read_index(prefix).lengths, np.int64)
    index = IndexedDataset(prefix).index
    first = int(index.sequence_pointers[0])
    begins = np.cumsum(lengths * index.dtype_size) - lengths * index.dtype_size + first
    if not np.array_equal(begins, index.sequence_pointers):
        raise DataError(f"the documents in {prefix}.bin do not follow one another", "make it again with moe-data")
    tokens = np.memmap(f"{prefix}.bin", index.dtype, "r", first, (int(lengths.sum()),))
    return ScoredText(name, tokens, lengths, None, eod)


def _of_files(name: str, path: str, data: DataConfig, tokenizer: Tokenizer) -> ScoredText:
    named = replace(
        data, source="files", path=path, sources=[], deduplicate="none", min_characters=0, max_characters=None,
        languages=[], filter=None,
    )  # fmt: skip
    begin = [tokenizer.bos] if data.prepend_bos and tokenizer.bos is not None else []
    end = [tokenizer.eod] if data.append_eod else []
    documents: list[np.ndarray] = []
    num_bytes = 0
    for text in _documents(named, path):
        num_bytes += len(text.encode())
        documents.append(np.array([*begin, *tokenizer.encode(text), *end], np.int64))
    tokens = np.concatenate(documents) if documents else np.empty(0, np.int64)
    return ScoredText(name, tokens, np.array([len(ids) for ids in documents], np.int64), num_bytes, tokenizer.eod)


def _documents(data: DataConfig, path: str) -> Iterator[str]:
    try:
        files = source_files(data)
    except DataError as error:
        remedy = "name a file, directory or glob of text, a dataset of moe-data, or the prefix of a .bin/.idx pair"
        raise DataError(error.cause.replace("data.path=", "").replace("data.path", path), remedy) from error
    for file in files:
        pieces = corpus.documents(data, [file], report=Report())
        if file.name.endswith(_PLAIN_TEXT):
            yield "".join(pieces)  # which training would cut
        else:
            yield from pieces


def text_bytes(tokenizer: Tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that tokens spell, without special tokens."""
    return len(tokenizer.decode(tokens.tolist()).encode())


class Windows(Dataset[Sample]):
    """The tokens of one source as sequences of `length`: tokens, labels, loss_mask and position_ids [s].

    Args:
        reset_at_eod: positions begin again after each document, and the first token of a document is not scored, as
            in training with data.reset_at_eod.
    """

    def __init__(self, text: ScoredText, length: int, reset_at_eod: bool = False) -> None:
        self._tokens, self._eod, self._length, self._reset = text.tokens, text.eod, length, reset_at_eod

    def __len__(self) -> int:
        return math.ceil(len(self._tokens) / self._length)

    def __getitem__(self, index: int) -> Sample:
        start = index * self._length
        labels = torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))
        before = int(self._tokens[start - 1]) if start else self._eod
        scored, padding = len(labels), self._length - len(labels)
        tokens = torch.cat([torch.tensor([before]), labels[:-1], labels.new_zeros(padding)])
        _, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            tokens, self._eod, self._reset, self._reset, self._reset, False
        )
        loss_mask[scored:] = 0
        labels = torch.cat([labels, labels.new_zeros(padding)])
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}


class Mixture(Dataset[Sample]):
    """The samples of several sources, each with the number of its source, and samples of nothing up to a multiple.

    Args:
        parts: one dataset a source. Where it is one dataset of several sources, its samples have their number as
            `dataset_id` (a blend).
        multiple: of the number of samples.
    """

    def __init__(self, parts: Sequence[Any], multiple: int) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.num_samples = int(self._ends[-1])
        self._padded = math.ceil(self.num_samples / multiple) * multiple

    def __len__(self) -> int:
        return self._padded

    def __getitem__(self, index: int) -> Sample:
        if index >= self.num_samples:
            sample = self[0]
            sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
            return sample
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part]) - len(self._parts[part])
        found = self._parts[part][index - first]
        sample = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        source = int(found.get("dataset_id", part))
        return {**sample, SOURCE: torch.full_like(sample["labels"], source)}
