"""Tokenizers: a byte-level BPE trained on the corpus, or any `tokenizer.json` of Hugging Face's format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moe_train.config.schema import DataConfig
from moe_train.files import untrusted
from parallel.errors import DataError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
COMPANIONS = (CONFIG, SPECIAL_TOKENS_MAP, "chat_template.jinja")
"""Files next to tokenizer.json that belong to the tokenizer, where they exist."""

END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_DOCUMENT, "<｜end▁of▁sentence｜>", "</s>", "<|im_end|>", "<|end_of_text|>", "<eos>")  # noqa: RUF001
_NO_TOKEN = -(2**40)  # outside the range of every dtype of a .bin file, unlike -1


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that a tokenizer's own files name for a role; None where they name none.

    Attributes:
        bos: begins a sequence.
        eos: ends a sequence.
        pad: fills up a batch.
        unk: replaces text that the vocabulary cannot express.
        adds_bos: whether the tokenizer itself puts `bos` before each text.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    adds_bos: bool = False


class Tokenizer:
    """What training, export and Megatron-Core's datasets need of a tokenizer.

    Args:
        path: tokenizer.json. Files next to it name special tokens.
        eod_token: token that ends a document; None takes the end-of-sequence token, or a well-known one.
        bos_token: token that begins a sequence; None takes the one that the tokenizer's files name.
        parse_special_tokens: whether text that spells a special token becomes that token.

    Attributes:
        special: the tokens that the tokenizer's files name.
        vocab_size: one more than the largest token id, so that a vocabulary with gaps fits too.
        eod, eod_token: id and text of the token that ends a document.
        bos, bos_token: id and text of the token that begins a sequence, or None.
        pad: a number that no dataset can hold: documents are packed end to end, and Megatron-Core leaves `pad` out of
            the loss.
        unique_identifiers: what Megatron-Core's caches of dataset indices are named after.

    Raises:
        DataError: a file is missing or damaged, or a token that is named does not exist.
    """

    def __init__(
        self,
        path: Path,
        eod_token: str | None = None,
        bos_token: str | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        self.path = path
        content, self._tokenizer = _load(path, "point data.tokenizer at a tokenizer.json")
        self.special = _special_tokens(path, self._tokenizer)
        self._tokenizer.encode_special_tokens = not parse_special_tokens
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eod_token, self.eod = self._end_of_document(eod_token)
        self.bos_token = bos_token or self.special.bos
        self.bos = None if self.bos_token is None else self._tokenizer.token_to_id(self.bos_token)
        if bos_token is not None and self.bos is None:
            raise DataError(f"data.bos_token={bos_token} is not a token of {path}", "correct data.bos_token")
        self.pad = _NO_TOKEN
        self.vocab_size = _vocab_size(self._tokenizer)
        self.unique_identifiers = {
            "class": type(self).__name__,
            "sha256": hashlib.sha256(content).hexdigest(),
            "eod": self.eod,
        }

    def _end_of_document(self, chosen: str | None) -> tuple[str, int]:
        """Text and id of the chosen token, else of the end-of-sequence token, else of a well-known one."""
        if chosen is not None:
            number = self._tokenizer.token_to_id(chosen)
            if number is None:
                raise DataError(f"data.eod_token={chosen} is not a token of {self.path}", "correct data.eod_token")
            return chosen, int(number)
        for token in (self.special.eos, *_KNOWN_ENDS):
            if token and (number := self._tokenizer.token_to_id(token)) is not None:
                return token, int(number)
        raise DataError(
            f"{self.path} defines no end-of-document token",
            f"set data.eod_token, or name eos_token in {CONFIG} next to it",
        )

    def token_id(self, token: str | None) -> int | None:
        """Id of the token with this text, None where there is none."""
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def special_texts(self) -> list[str]:
        """The texts of the special tokens."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [str(token.content) for token in added if token.special]

    def text_of(self, token: int) -> str:
        """The text of a single token. That of a special token, or of a part of a character, is its name."""
        text = self.decode([token])
        named = self._tokenizer.id_to_token(token)
        return named if named is not None and (not text or "\ufffd" in text) else text

    def beginning_with(self, token: str) -> str:
        """Content of a tokenizer.json that puts `token` before each text, as documents of the dataset have it."""
        changed = tokenizers.Tokenizer.from_file(str(self.path))
        single, pair = f"{token}:0 $A:0", f"{token}:0 $A:0 {token}:1 $B:1"
        first = processors.TemplateProcessing(single, pair, [(token, self.token_id(token))])
        others = [] if changed.post_processor is None else [changed.post_processor]
        changed.post_processor = processors.Sequence([*others, first])
        return str(changed.to_str(pretty=True))

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether both give each id to the same token."""
        return bool(self._tokenizer.get_vocab() == other._tokenizer.get_vocab())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no token is added before or after it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._tokenizer.decode(ids)


def _special_tokens(path: Path, tokenizer: tokenizers.Tokenizer) -> SpecialTokens:
    """What tokenizer_config.json and special_tokens_map.json next to `path` name, read in transformers' order."""
    config, tokens = (_read_object(path.with_name(name)) for name in (CONFIG, SPECIAL_TOKENS_MAP))
    # transformers reads the map only for configs of before 4.34, which have no added_tokens_decoder; it wins there.
    first, second = (config, tokens) if "added_tokens_decoder" in config else (tokens, config)
    by_role = {role: _content(first, f"{role}_token") or _content(second, f"{role}_token")
             for role in ("bos", "eos", "pad", "unk")}  # fmt: skip
    if by_role["eos"] is not None and tokenizer.token_to_id(by_role["eos"]) is None:
        source = CONFIG if by_role["eos"] == _content(config, "eos_token") else SPECIAL_TOKENS_MAP
        raise DataError(
            f"{path.with_name(source)} has eos_token {by_role['eos']!r}, which {path.name} has not",
            "correct eos_token",
        )
    begins = tokenizer.encode("a", add_special_tokens=True).tokens[:1]
    adds_bos = config.get("add_bos_token")
    return SpecialTokens(
        **by_role,
        adds_bos=adds_bos if isinstance(adds_bos, bool) else by_role["bos"] is not None and begins == [by_role["bos"]],
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty without a file."""
    if not path.exists():
        return {}
    try:
        return untrusted.read_object(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a tokenizer's configuration: {error}", "replace or remove it") from error


def _content(values: dict[str, Any], name: str) -> str | None:
    """The token that `name` holds, as text or as an object with its text."""
    value = values.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def special_tokens(path: Path) -> SpecialTokens:
    """Special tokens that the files of a tokenizer name, of a tokenizer.json or of a directory with one.

    Raises:
        DataError: a file is missing or damaged.
    """
    file = path / TOKENIZER if path.is_dir() else path
    return _special_tokens(file, _load(file, "replace it")[1])


def vocab_size(path: Path) -> int:
    """One more than the largest token id of the tokenizer.json at `path`.

    Raises:
        DataError: it is missing or damaged.
    """
    return _vocab_size(_load(path, "replace it")[1])


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """From the library's ids: those that the file gives to added tokens may differ."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _load(path: Path, remedy: str) -> tuple[bytes, tokenizers.Tokenizer]:
    """Content of a tokenizer.json, and the tokenizer in it."""
    try:
        content = untrusted.read_bytes(path, untrusted.LARGEST_JSON_BYTES)
        return content, tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer: {error}", remedy) from error


def companions(path: Path) -> list[Path]:
    """Files next to the tokenizer.json at `path` that belong to it, as far as they exist."""
    return [file for name in COMPANIONS if (file := path.with_name(name)).is_file()]


def load_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that the dataset at `data.dir` was made with; its `eod` and `bos` are those of the dataset.

    Raises:
        DataError: it is missing or damaged.
    """
    path = Path(data.dir) / TOKENIZER
    if not path.exists():
        raise DataError(
            f"data.dir={data.dir} has no {TOKENIZER}",
            "make the dataset with moe-data data=text data.path=..., or correct data.dir",
        )
    eod_token, bos_token = data.eod_token, data.bos_token
    if eod_token is None or bos_token is None:
        recorded = _recorded_tokens(path.with_name("manifest.json"))
        eod_token, bos_token = eod_token or recorded.get("eod"), bos_token or recorded.get("bos")
    return Tokenizer(path, eod_token, bos_token, data.parse_special_tokens)


def _recorded_tokens(manifest: Path) -> dict[str, str | None]:
    """The tokens that a dataset was made with: `eod` and `bos`. Empty without a manifest, or with an older one."""
    try:
        tokens = untrusted.read_object(manifest)["special_tokens"]
        return {role: _content(tokens, role) for role in ("eod", "bos")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # reading the dataset reports a manifest that is damaged


def find_tokenizer(name: str, field: str = "data.tokenizer") -> Path:
    """tokenizer.json at `name`, a file or a Hugging Face tokenizer directory.

    Args:
        field: of the config, which has `name`, for errors.

    Raises:
        DataError: there is none.
    """
    path = Path(name)
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{field}={name} has no {TOKENIZER}", f"name a {TOKENIZER} or a directory with one")
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
