"""Parts of a corpus in a random order, as one dataset."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from moe_train.data import shuffle
from moe_train.data.shuffle import Order
from parallel.errors import DataError

DTYPE = np.dtype(np.uint16)
DOCUMENTS = [[1, 2], [3], [], [4, 5, 6], [], [7], [8, 65_535]]


def write(folder: Path, corpus: list[list[list[int]]]) -> int:
    """The documents of each part; returns how many parts there are."""
    folder.mkdir()
    for number, documents in enumerate(corpus):
        np.array(list(chain.from_iterable(documents)), DTYPE).tofile(folder / f"{number:06d}.tokens")
        np.save(folder / f"{number:06d}.npy", np.array([len(document) for document in documents], np.int64))
    return len(corpus)


def written(folder: Path, count: int, segment_tokens: int = 3, dtype: np.dtype = DTYPE) -> tuple[int, int, str]:
    """Make the dataset folder/text of all parts."""
    order = Order(folder / "order", segment_tokens)
    shuffle.order(folder, 0, count, order)
    segments = shuffle.segments(order)
    for number, (first, last) in enumerate(segments):
        shuffle.gather(folder, order, number, first, last, dtype)
    return shuffle.join(order, len(segments), folder / "text.bin", folder / "text.idx", dtype)


def documents_of(folder: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(folder / "text"))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("segment_tokens", [1, 3, 100])
def test_a_dataset_has_each_document_of_its_parts_once(segment_tokens: int, tmp_path: Path) -> None:
    """Those of no tokens are left out, and the order does not depend on how the corpus was cut."""
    three, one = tmp_path / "three", tmp_path / "one"
    count = write(three, [DOCUMENTS[:3], DOCUMENTS[3:4], [], DOCUMENTS[4:]])
    documents, tokens, sha256 = written(three, count, segment_tokens)
    assert (documents, tokens) == (5, 9)
    assert sha256 == hashlib.sha256((three / "text.bin").read_bytes()).hexdigest()
    assert sorted(documents_of(three)) == sorted(document for document in DOCUMENTS if document)
    assert written(one, write(one, [DOCUMENTS])) == (documents, tokens, sha256)
    assert (one / "text.idx").read_bytes() == (three / "text.idx").read_bytes()


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_the_files_are_those_of_megatron_cores_builder(kind: type, tmp_path: Path) -> None:
    """In the order that earlier versions had: a permutation of the documents that have tokens."""
    dtype = np.dtype(kind)
    draw = np.random.default_rng(5)
    documents = [draw.integers(0, 60_000, size).astype(dtype) for size in draw.integers(0, 9, 300)]
    folder = tmp_path / "parts"
    folder.mkdir()
    np.concatenate(documents).tofile(folder / "000000.tokens")
    np.save(folder / "000000.npy", np.array([len(document) for document in documents], np.int64))
    written(folder, 1, 100, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=kind)
    with_tokens = [i for i, document in enumerate(documents) if len(document)]
    for i in np.random.default_rng(0).permutation(with_tokens):
        builder.add_document(documents[i], [len(documents[i])])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (folder / f"text.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_a_part_that_was_cut_off_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    write(folder, [[[1, 2]], [[3], [4, 5, 6]]])
    damaged = folder / "000001.tokens"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{damaged} is damaged; delete {folder} and run the command again"):
        written(folder, 2)


def test_no_documents_have_no_segments(tmp_path: Path) -> None:
    count = write(tmp_path / "parts", [[[]], []])
    assert written(tmp_path / "parts", count)[:2] == (0, 0)
