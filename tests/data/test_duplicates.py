"""Tables of duplicates on disk, compared with sets in memory and with datasketch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_train.data import duplicates, minhash
from moe_train.data.duplicates import KeyWriter, ShardKeys, Tables
from tests.data.corpora import planted

THRESHOLD = 0.8


def tables_of(folder: Path, tables: Tables, shards: Sequence[Sequence[str]]) -> list[ShardKeys]:
    found, first = [], 0
    for number, texts in enumerate(shards):
        keys, signatures = folder / f"{number}.keys", folder / f"{number}.signatures"
        with KeyWriter(tables, keys, signatures) as writer:
            for text in texts:
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                writer.add(text, digest if tables.exact else None)
        found.append(ShardKeys(keys, signatures, first, tuple(writer.runs)))
        first += len(texts)
    return found


def dropped(tables: Tables, shards: list[ShardKeys], partitions: int, memory_bytes: int = 2**20) -> set[int]:
    rows = [
        duplicates.find(tables, shards, table, partition, partitions, memory_bytes)
        for table in range(tables.count)
        for partition in range(partitions)
    ]
    return set(np.concatenate(rows).tolist())


@pytest.mark.parametrize("partitions", [1, 7])
def test_every_repetition_of_a_text_is_found_in_any_shard_and_run(
    partitions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_RUN_ROWS", 16)
    draw = random.Random(0)
    texts = [str(draw.randrange(120)) for _ in range(300)]
    shards = tables_of(tmp_path, Tables(True, None), [texts[:101], [], texts[101:103], texts[103:]])
    assert max(len(shard.runs) for shard in shards) == 13
    assert dropped(Tables(True, None), shards, partitions) == {i for i, t in enumerate(texts) if t in texts[:i]}


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Recall of at least 0.98 and precision of at least 0.99, by the exact Jaccard similarity."""
    texts, copies = planted(400, seed=1)
    tables = Tables(False, THRESHOLD)
    third = len(texts) // 3
    shards = tables_of(tmp_path, tables, [texts[:third], texts[third:]])
    found = dropped(tables, shards, 1)
    assert len(found & copies) / len(copies) >= 0.98
    assert len(found & copies) / len(found) >= 0.99
    assert dropped(tables, shards, 5, memory_bytes=10_000) == found, "for any memory"


def test_datasketch_finds_the_same_near_duplicates(tmp_path: Path) -> None:
    datasketch = pytest.importorskip("datasketch")
    texts, copies = planted(60, seed=2)
    index = datasketch.MinHashLSH(num_perm=128, params=minhash.bands_of(THRESHOLD))
    signatures: dict[str, datasketch.MinHash] = {}
    theirs: set[int] = set()
    for number, text in enumerate(texts):
        signature = datasketch.MinHash(num_perm=128)
        signature.update_batch([shingle.encode() for shingle in naive_shingles(text)])
        if any(signature.jaccard(signatures[name]) >= THRESHOLD for name in index.query(signature)):
            theirs.add(number)
        signatures[str(number)] = signature
        index.insert(str(number), signature)
    tables = Tables(False, THRESHOLD)
    ours = dropped(tables, tables_of(tmp_path, tables, [texts]), 1)
    assert ours == theirs == copies


def test_a_document_is_dropped_for_an_earlier_one_only(tmp_path: Path) -> None:
    one, other = planted(1, seed=3)[0][0], planted(1, seed=9)[0][0]
    tables = Tables(False, THRESHOLD)
    shards = tables_of(tmp_path, tables, [[one, other, one + " end", other + " end", one]])
    assert dropped(tables, shards, 1) == {2, 3, 4}


@pytest.mark.parametrize("memory_bytes", [1, 2**20])
def test_documents_that_share_a_band_without_being_similar_are_compared_with_others_in_turn(
    memory_bytes: int, tmp_path: Path
) -> None:
    """Signatures of 128 values, the same ones where the digits are the same. Rows count on over two shards."""
    values = np.repeat(
        np.array([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 9], [2, 2, 9, 2], [3, 3, 3, 3], [3, 3, 1, 1]]), 32, 1
    )
    for number, part in enumerate((values[:2], values[2:])):
        part.astype(np.uint16).tofile(tmp_path / f"{number}.signatures")
    shards = [ShardKeys(tmp_path / "0.keys", tmp_path / "0.signatures", 0, (2,)),
              ShardKeys(tmp_path / "1.keys", tmp_path / "1.signatures", 2, (1, 3))]  # fmt: skip
    rows, groups = np.arange(6), np.zeros(6, np.int64)
    assert duplicates._near(groups, rows, shards, 0.75, memory_bytes).tolist() == [2, 3]
    assert duplicates._near(groups, rows, shards, 0.5, memory_bytes).tolist() == [2, 3, 5]
    assert duplicates._near(np.arange(6), rows, shards, 0.75, memory_bytes).tolist() == []


def naive_shingles(text: str) -> set[str]:
    normal = " ".join(text.lower().split()).ljust(minhash.SHINGLE_CHARACTERS)
    return {normal[i : i + minhash.SHINGLE_CHARACTERS] for i in range(len(normal) - minhash.SHINGLE_CHARACTERS + 1)}


def test_shingles_are_those_of_each_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab é漢🙂 \n", k=size)) for size in (0, 5, 24, 25, 300, 24, 1000)]
    hashes, offsets = minhash.shingles(texts)
    by_hash: dict[int, str] = {}
    for text, begin, end in zip(texts, offsets, offsets[1:], strict=False):
        normal = " ".join(text.lower().split()).ljust(24)
        assert end - begin == len(normal) - 23
        for i, value in enumerate(hashes[int(begin) : int(end)].tolist()):
            assert by_hash.setdefault(value, normal[i : i + 24]) == normal[i : i + 24], "no collision"
    assert len(by_hash) == len(set().union(*map(naive_shingles, texts))), "equal text has equal hashes"
    monkeypatch.setattr(minhash, "_BLOCK_CHARACTERS", 7)
    assert np.array_equal(minhash.shingles(texts)[0], hashes), "in blocks of any length"


def test_the_similarity_of_signatures_estimates_that_of_sets() -> None:
    texts, _ = planted(40, seed=4)
    signatures = minhash.signatures(texts)
    errors = []
    for i in range(len(texts) - 1):
        one, other = naive_shingles(texts[i]), naive_shingles(texts[i + 1])
        estimate = (signatures[i] == signatures[i + 1]).mean()
        errors.append(estimate - len(one & other) / len(one | other))
    assert abs(np.mean(errors)) < 0.01
    assert np.abs(errors).max() < 0.16, "4 standard deviations of 128 samples"


def test_bands_find_what_is_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95):
        bands, rows = minhash.bands_of(threshold)
        assert bands * rows <= minhash.PERMUTATIONS
        assert 1 - (1 - threshold**rows) ** bands >= 0.99
        wider = minhash.PERMUTATIONS // (rows + 1)
        assert 1 - (1 - threshold ** (rows + 1)) ** wider < 0.99
    assert minhash.bands_of(0.8) == (21, 6)
