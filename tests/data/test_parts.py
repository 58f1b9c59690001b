"""Parts of a corpus: how it is cut, and one dataset made of them."""

from __future__ import annotations

import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.progress import Progress

from moe_train.data import parts
from parallel.errors import DataError

DTYPE = np.dtype(np.uint16)


def write(folder: Path, corpus: list[list[list[int]]]) -> int:
    """The documents of each part; returns how many parts there are."""
    folder.mkdir()
    for number, documents in enumerate(corpus):
        np.array(list(chain.from_iterable(documents)), DTYPE).tofile(folder / f"{number:06d}.tokens")
        np.save(folder / f"{number:06d}.npy", np.array([len(document) for document in documents], np.int64))
    return len(corpus)


def merge(folder: Path, corpus: list[list[list[int]]]) -> tuple[tuple[int, int], list[list[int]]]:
    """The numbers of documents and tokens, and the documents of the dataset."""
    count = write(folder, corpus)
    bin_path, idx_path = folder / "text.bin", folder / "text.idx"
    counts = parts.merge(folder, count, bin_path, idx_path, DTYPE, Progress(disable=True))
    dataset = IndexedDataset(str(folder / "text"))
    return counts, [dataset[i].tolist() for i in range(len(dataset))]


def test_a_dataset_has_each_document_of_its_parts_once(tmp_path: Path) -> None:
    """Those of no tokens are left out, and the order does not depend on how the corpus was cut."""
    documents = [[1, 2], [3], [], [4, 5, 6], [], [7], [8, 65_535]]
    counts, found = merge(tmp_path / "three", [documents[:3], documents[3:4], documents[4:]])
    assert counts == (5, 9)
    assert sorted(found) == [document for document in documents if document]
    assert merge(tmp_path / "one", [documents]) == (counts, found)
    assert (tmp_path / "one/text.bin").stat().st_size == 9 * 2


def test_a_part_that_was_cut_off_is_named(tmp_path: Path) -> None:
    write(tmp_path / "parts", [[[1, 2]], [[3], [4, 5, 6]]])
    damaged = tmp_path / "parts/000001.tokens"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{damaged} is damaged; delete {tmp_path}/parts and run the command again"):
        parts.merge(tmp_path / "parts", 2, tmp_path / "a.bin", tmp_path / "a.idx", DTYPE, Progress(disable=True))


def test_a_part_ends_with_the_document_that_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_CHARACTERS", 10)
    texts = ["a" * size for size in (4, 6, 3, 20, 9)]
    assert [[len(text) for text in batch] for batch in parts._batches(iter(texts))] == [[4, 6], [3, 20], [9]]
    assert list(parts._batches(iter(texts[:2]))) == [texts[:2]]
    assert list(parts._batches(iter([]))) == []


@pytest.mark.parametrize("held", [set(), {signal.SIGINT}], ids=["open", "held back"])
def test_ctrl_c_is_held_back_only_while_a_process_starts(held: set[signal.Signals]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        with parts._no_interrupt():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | held
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
