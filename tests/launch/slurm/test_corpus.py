"""The text of a submission is counted as moe-data would read it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from launch.slurm import corpus
from moe_train.config.schema import Config, DataConfig
from moe_train.data.tokenizer import Tokenizer, train_tokenizer
from parallel.errors import ConfigError, DataError


def test_links_count_as_moe_data_reads_them(tmp_path: Path) -> None:
    root, other = tmp_path / "text", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "a.txt").write_text("12345")
    (other / "b.txt").write_text("1234567890")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "linked").symlink_to(other)
    data = DataConfig(source="files", path=str(root), dir=str(tmp_path / "made"))
    assert corpus._text_bytes(data) == 15
    data.follow_links = False
    assert corpus._text_bytes(data) == 5


def test_a_directory_without_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match=r"has no \.txt, .* file; 1 files of other kinds"):
        corpus._text_bytes(DataConfig(source="files", path=str(tmp_path), dir=str(tmp_path / "made")))


def _text(root: Path) -> DataConfig:
    """Text, with a tokenizer whose file gives a far too large id to an added token."""
    (root / "a.txt").write_text("a b c")
    train_tokenizer(["hello world"], 300, root / "tokenizer.json")
    content = json.loads((root / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<x>", "id": 50_000})
    (root / "tokenizer.json").write_text(json.dumps(content))
    return DataConfig(source="files", path=str(root / "a.txt"), dir=str(root / "made"), tokenizer=str(root))


def test_the_vocabulary_is_that_of_the_library_which_trains_with_it(tmp_path: Path) -> None:
    """It numbers added tokens itself."""
    data = _text(tmp_path)
    size = corpus.of(Config(data=data)).vocab_size
    assert size == Tokenizer(tmp_path / "tokenizer.json").vocab_size
    assert size is not None
    assert size < 400
    data.tokenizer = str(tmp_path / "tokenizer.json")
    assert corpus.of(Config(data=data)).vocab_size == size


def test_a_tokenizer_that_the_job_cannot_read_is_told(tmp_path: Path) -> None:
    data = _text(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        corpus.of(Config(data=data))
    data.tokenizer = str(tmp_path / "later")
    with pytest.raises(corpus.NotThere, match=r"data\.tokenizer=.*later has no tokenizer\.json"):
        corpus.of(Config(data=data))


def _prepared(place: Path, tokens: int = 1000, vocab_size: int | None = 500) -> Config:
    """A dataset of `tokens` tokens, of which 90 % are trained on, for a model of 1,000 tokens."""
    place.mkdir(exist_ok=True)
    files = {name: {"bytes": 4, "sha256": ""} for name in ("text_document.bin", "text_document.idx")}
    for name in files:
        (place / name).write_bytes(b"text")
    known = {} if vocab_size is None else {"vocab_size": vocab_size}
    (place / "manifest.json").write_text(json.dumps({"files": files, "tokens": tokens, **known}))
    cfg = Config(data=DataConfig(source="none", dir=str(place), split="90,5,5"))
    cfg.model.vocab_size = 1000
    return cfg


@pytest.mark.parametrize(
    ("tokens", "line", "notes"),
    [
        (900, "read 1 times", []),
        (3600, "read 4 times", []),
        (3601, "read 4 times", ["4.0 epochs: repeated data add little after 4 (arXiv 2305.16264)"]),
        (90_000, "read 1e+02 times", ["100.0 epochs: repeated data add little after 4 (arXiv 2305.16264)"]),
    ],
)
def test_epochs_are_counted_over_what_is_trained_on(tokens: int, line: str, notes: list[str], tmp_path: Path) -> None:
    """1,000 tokens, 900 of them for training. More than 4 epochs are told, and 100 are the most."""
    tokenizer = "tokenizer of 500 entries for model.vocab_size=1,000"
    assert corpus.check(_prepared(tmp_path), tokens) == (
        f"{tmp_path}: 900 tokens to train on, {line}, {tokenizer}", notes
    )  # fmt: skip


def test_more_than_100_epochs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        corpus.check(_prepared(tmp_path), 90_001)
    assert (
        error.value.cause == f"{tmp_path} has 900 tokens to train on, and the run of 90,001 would read them 100 times"
    )


@pytest.mark.parametrize(("size", "told"), [(None, []), (500, []), (499, ["501 of 1,000 rows"]), (1000, [])])
def test_rows_without_a_token_are_told_where_they_are_more_than_half(
    size: int | None, told: list[str], tmp_path: Path
) -> None:
    _, notes = corpus.check(_prepared(tmp_path, vocab_size=size), 900)
    assert [note[: len(text)] for note, text in zip(notes, told, strict=True)] == told


def test_a_tokenizer_may_have_as_many_entries_as_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1000 is below the 1,001 entries"):
        corpus.check(_prepared(tmp_path, vocab_size=1001), 900)


def test_a_file_of_another_size_is_told(tmp_path: Path) -> None:
    cfg = _prepared(tmp_path)
    (tmp_path / "text_document.idx").write_bytes(b"texts")
    with pytest.raises(ConfigError, match=r"text_document\.idx has 5 bytes, not 4 as when it was made"):
        corpus.check(cfg, 900)


@pytest.mark.parametrize(
    ("dtype", "width"), [(np.uint8, 1), (np.int8, 1), (np.int16, 2), (np.int32, 4), (np.int64, 8), (np.uint16, 2)]
)
def test_tokens_of_a_blend_are_counted_by_their_width(dtype: type, width: int, tmp_path: Path) -> None:
    """By the codes of Megatron-Core's .idx files."""
    (tmp_path / "a.idx").write_bytes(struct.pack("<9sQB", b"MMIDIDX\0\0", 1, DType.code_from_dtype(dtype)))
    (tmp_path / "a.bin").write_bytes(bytes(5 * width))
    assert corpus._tokens_at(str(tmp_path / "a")) == 5


def test_a_dataset_without_a_tokenizer_has_no_known_vocabulary(tmp_path: Path) -> None:
    assert corpus._vocabulary(tmp_path) is None
    train_tokenizer(["hello world"], 300, tmp_path / "tokenizer.json")
    assert corpus._vocabulary(tmp_path) == Tokenizer(tmp_path / "tokenizer.json").vocab_size
