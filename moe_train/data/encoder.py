"""Token ids of documents, by Hugging Face tokenizers, or by gigatoken where its ids are the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from moe_train.data.tokenizer import Tokenizer
from parallel.errors import DataError

_SAMPLE_CHARACTERS = 50_000


class Encoder:
    """Encodes the documents of one part.

    Args:
        library: tokenizers or gigatoken, as `data.prepare_tokenizer`.

    Attributes:
        fallback: whether gigatoken gave other ids for a sample of the part, so that tokenizers encodes all of it.

    Raises:
        DataError: gigatoken is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, library: str) -> None:
        self._tokenizer = tokenizer
        self.fallback = False
        self._fast = _gigatoken(tokenizer) if library == "gigatoken" else None
        special = [re.escape(text) for text in tokenizer.special_texts]
        self._special = re.compile("|".join(special)) if special else None
        self._checked = 0

    def __call__(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """The ids of each text, of type `dtype`."""
        if self._fast is None or self.fallback:
            return self._slow(texts, dtype)
        if self._checked < _SAMPLE_CHARACTERS and not self._agrees(texts, dtype):
            self.fallback = True
            return self._slow(texts, dtype)
        return self._quick(texts, dtype)

    def _slow(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype) for ids in self._tokenizer.encode_batch(list(texts))]

    def _quick(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """Texts that spell a special token go to tokenizers, which parses them or not, as configured."""
        assert self._fast is not None
        spelled = {i for i, text in enumerate(texts) if self._special is not None and self._special.search(text)}
        plain = [text for i, text in enumerate(texts) if i not in spelled]
        quick = iter(_encoded(self._fast, plain, dtype) if plain else [])
        slow = iter(self._slow([texts[i] for i in sorted(spelled)], dtype))
        return [next(slow) if i in spelled else next(quick) for i in range(len(texts))]

    def _agrees(self, texts: Sequence[str], dtype: np.dtype[Any]) -> bool:
        """Whether both libraries give the same ids for the next part of the sample."""
        sample = []
        for text in texts:
            if self._checked >= _SAMPLE_CHARACTERS:
                break
            sample.append(text)
            self._checked += len(text)
        pairs = zip(self._quick(sample, dtype), self._slow(sample, dtype), strict=True)
        return all(np.array_equal(one, other) for one, other in pairs)


def _encoded(fast: Any, texts: list[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
    import awkward

    found = fast.encode_batch(texts, parallel=False)
    ends = np.cumsum(awkward.to_numpy(awkward.num(found)))
    return np.split(awkward.to_numpy(awkward.flatten(found)).astype(dtype), ends[:-1])


@lru_cache(maxsize=1)
def _gigatoken(tokenizer: Tokenizer) -> Any:
    """The same tokenizer of gigatoken, kept for the next part; None where it does not support it."""
    try:
        import gigatoken
    except ImportError as error:
        raise DataError(
            "data.prepare_tokenizer=gigatoken needs gigatoken, which is not installed",
            "pip install 'moe-train[data]', or set data.prepare_tokenizer=tokenizers",
        ) from error
    try:
        return gigatoken.Tokenizer.from_json(tokenizer.path.read_bytes())
    except Exception:  # a kind of tokenizer that it does not support
        return None
