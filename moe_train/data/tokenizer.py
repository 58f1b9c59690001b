"""Tokenizers: a byte-level BPE trained on the corpus, or any `tokenizer.json` of Hugging Face's format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_train.config.schema import DataConfig
from parallel.errors import DataError

CONFIG = "tokenizer_config.json"
END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_DOCUMENT, "<｜end▁of▁sentence｜>", "</s>", "<|im_end|>", "<|end_of_text|>", "<eos>")  # noqa: RUF001


class Tokenizer:
    """What training and Megatron-Core's datasets need of a tokenizer.

    Attributes:
        vocab_size: one more than the largest token id, so that a vocabulary with gaps fits too.
        eod: id of the token that ends a document.
        pad: -1, which no token has: documents are packed end to end, and Megatron-Core leaves `pad` out of the loss.
        unique_identifiers: what Megatron-Core's caches of dataset indices are named after.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{path} is not a tokenizer: {error}", "point data.tokenizer at a tokenizer.json"
            ) from error
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eod = self._end_of_document()
        self.pad = -1
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        self.unique_identifiers = {
            "class": type(self).__name__,
            "sha256": hashlib.sha256(content).hexdigest(),
            "eod": self.eod,
        }

    def _end_of_document(self) -> int:
        """The end-of-sequence token that tokenizer_config.json names, else a well-known one."""
        for token in (self._named_end(), *_KNOWN_ENDS):
            if token and (number := self._tokenizer.token_to_id(token)) is not None:
                return int(number)
        raise DataError(
            f"{self.path} names no end-of-document token",
            f"add one of {', '.join(_KNOWN_ENDS)}, or eos_token in {CONFIG}",
        )

    def _named_end(self) -> str | None:
        config = self.path.with_name(CONFIG)
        if not config.exists():
            return None
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{config} is not a tokenizer's configuration: {error}", "replace or remove it") from error
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str) and self._tokenizer.token_to_id(named) is None:
            raise DataError(f"{config} has eos_token {named!r}, which {self.path.name} has not", "correct eos_token")
        return named if isinstance(named, str) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._tokenizer.decode(ids)


def load_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that the dataset at `data.dir` was made with.

    Raises:
        DataError: it is missing or damaged.
    """
    path = Path(data.dir) / "tokenizer.json"
    if not path.exists():
        raise DataError(f"data.dir={data.dir} has no tokenizer.json", "make the dataset with moe-data")
    return Tokenizer(path)


def find_tokenizer(name: str) -> Path:
    """tokenizer.json at `name`, a file or a Hugging Face tokenizer directory.

    Raises:
        DataError: there is none.
    """
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"data.tokenizer={name} has no tokenizer.json", "name a tokenizer.json or a directory with one")
    return path


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of at most `vocab_size` tokens and write it to `path`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
