"""gigatoken in place of tokenizers, where its ids are the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data import encoder as encoder_module
from moe_train.data.encoder import Encoder
from moe_train.data.tokenizer import Tokenizer, train_tokenizer

DTYPE = np.dtype(np.uint16)


def mixed(count: int) -> list[str]:
    """Code, CJK, emoji, control characters, text of no encoding, long lines, and the name of a special token."""
    draw = random.Random(0)
    pieces = [
        "def f(x):\n\treturn x ** 2\n", "漢字かな交じり文", "🙂👩‍👧🇩🇪", "\x00\x1f\ufffd", "naïve Ä ß \ufb01", " " * 40,
        "a" * 5000, "1234567890.5e-3", "<|endoftext|>", "\r\n\n", "It's we'll THEY'D", "\u202e\u0301e\u0301",
    ]  # fmt: skip
    return ["".join(draw.choices(pieces, k=draw.randint(0, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(mixed(200), 600, file)
    return file


@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_the_ids_of_gigatoken_are_those_of_tokenizers(parse_special_tokens: bool, path: Path) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(path, parse_special_tokens=parse_special_tokens)
    encoder = Encoder(tokenizer, "gigatoken")
    texts = mixed(400)
    found = [ids for i in range(0, 400, 50) for ids in encoder(texts[i : i + 50], DTYPE)]
    assert not encoder.fallback
    assert [ids.tolist() for ids in found] == tokenizer.encode_batch(texts)
    assert {ids.dtype for ids in found} == {DTYPE}


def test_where_the_ids_differ_tokenizers_encodes_the_part(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Any, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
        return [np.zeros(3, dtype) for _ in texts]

    monkeypatch.setattr(encoder_module, "_gigatoken", lambda _: object())
    monkeypatch.setattr(encoder_module, "_encoded", wrong)
    tokenizer = Tokenizer(path)
    encoder = Encoder(tokenizer, "gigatoken")
    for texts in (["some text"], mixed(3)):
        assert [ids.tolist() for ids in encoder(texts, DTYPE)] == tokenizer.encode_batch(texts)
    assert encoder.fallback
