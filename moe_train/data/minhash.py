"""MinHash signatures and LSH bands of documents, through rensa."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel.errors import DataError

SHINGLE_CHARACTERS = 24
"""As NVIDIA NeMo Curator's fuzzy deduplication; lower-case, and white space counts as one space."""
PERMUTATIONS = 128
_SEED = 1
_RECALL = 0.99
_BLOCK_CHARACTERS = 4096
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def available(field: str) -> Any:
    """The class of rensa that makes signatures.

    Args:
        field: what asks for it, for the error.

    Raises:
        DataError: rensa is not installed.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"  # one process a core already
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise DataError(
            f"{field} needs rensa, which is not installed",
            "pip install 'moe-train[data]', or set data.near_duplicates=null",
        ) from error
    return RMinHash


def bands_of(threshold: float) -> tuple[int, int]:
    """Bands of a signature and rows of each: the most rows with which two documents of a similarity of `threshold`
    share a band with a probability of 0.99 (Leskovec et al., Mining of Massive Datasets, section 3.4)."""
    fitting = [
        (PERMUTATIONS // rows, rows) for rows in range(1, PERMUTATIONS + 1)
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= _RECALL
    ]  # fmt: skip
    return fitting[-1]


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all sequences of `SHINGLE_CHARACTERS` characters, and where those of each text begin.

    A shorter text has one. Returns uint64 [shingles] and uint64 [texts + 1].
    """
    normal = [" ".join(text.lower().split()).ljust(SHINGLE_CHARACTERS) for text in texts]
    lengths = np.array([len(text) for text in normal], np.int64)
    characters = np.frombuffer("".join(normal).encode("utf-32-le"), np.uint32)
    overlap = SHINGLE_CHARACTERS - 1
    # Blocks stay in the cache of a core, which is four times as fast.
    blocks = [_rolling(characters[i : i + _BLOCK_CHARACTERS + overlap].astype(np.uint64))
              for i in range(0, len(characters) - overlap, _BLOCK_CHARACTERS)]  # fmt: skip
    own = lengths - overlap
    ends = np.cumsum(lengths)
    reaching = (ends[:-1, None] - overlap + np.arange(overlap)).ravel()  # into the next text
    hashes = np.delete(np.concatenate(blocks), reaching)
    return hashes, np.concatenate([[0], np.cumsum(own)]).astype(np.uint64)


def _rolling(characters: np.ndarray) -> np.ndarray:
    """A hash of every `SHINGLE_CHARACTERS` characters that follow one another, by doubling: 1, 2, 4, 8, 16, 16 + 8."""
    one = characters * _MULTIPLIER
    one ^= one >> np.uint64(29)
    of: dict[int, np.ndarray] = {1: one}
    for length in (1, 2, 4, 8):
        of[2 * length] = _joined(of[length], of[length], length)
    hashes = _joined(of[16], of[8], 16)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(29)
    return hashes


def _joined(left: np.ndarray, right: np.ndarray, length: int) -> np.ndarray:
    """The hash of `length` characters of `left`, followed by those of `right`."""
    count = len(right) - length
    hashes = left[:count] * np.uint64(pow(int(_MULTIPLIER), length, 2**64))
    hashes += right[length:]
    return hashes


def mixed(values: np.ndarray) -> np.ndarray:
    """The values with all bits mixed (SplitMix64, Steele et al. 2014)."""
    z = values + _MULTIPLIER
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures, uint32 [texts, PERMUTATIONS]."""
    hashes, offsets = shingles(texts)
    kind = available("data.near_duplicates")
    matrix = kind.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), PERMUTATIONS)


def band_keys(found: np.ndarray, band: int, rows: int) -> np.ndarray:
    """A hash of one band of each signature, uint64 [texts]."""
    key = np.zeros(len(found), np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        key = mixed(key ^ found[:, column].astype(np.uint64))
    return key
