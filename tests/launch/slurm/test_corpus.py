"""The text of a submission is counted as moe-data would read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.slurm import corpus
from moe_train.config.schema import Config, DataConfig
from moe_train.data.tokenizer import Tokenizer, train_tokenizer
from parallel.errors import DataError


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
