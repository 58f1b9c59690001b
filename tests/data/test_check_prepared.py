"""Datasets that are not ours to make are looked at before any rank starts."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.config.composition.compose import compose
from moe_train.config.model import ModelConfig
from moe_train.config.schema import BlendEntry, DataConfig
from moe_train.data.prepare import _bar, check_prepared, compare, examine, known_vocabulary
from parallel.errors import DataError


def test_what_is_missing_is_named(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """No directory, no vocabulary for it, then a prefix of a blend without its files."""
    made = next(item.removeprefix("data.dir=") for item in small_data if item.startswith("data.dir="))
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    data = compose(["data=indexed", f"data.dir={copied}"]).data
    check_prepared(data, 512)
    with pytest.raises(DataError, match=r"512 tokens.*model\.vocab_size"):
        check_prepared(data, 256)
    data.blend = [BlendEntry(f"{copied}/{name}", 1.0) for name in ("text_document", "absent")]
    with pytest.raises(DataError, match=r"absent\.bin"):
        check_prepared(data, 512)
    with pytest.raises(DataError, match=r"data\.dir"):
        check_prepared(compose(["data=indexed", f"data.dir={tmp_path}/none"]).data, 512)


def _two(small_data: tuple[str, ...], tmp_path: Path) -> DataConfig:
    """A blend of two copies of a dataset, one of them at data.dir."""
    made = next(item.removeprefix("data.dir=") for item in small_data if item.startswith("data.dir="))
    for name in ("first", "second"):
        shutil.copytree(made, tmp_path / name)
    data = compose(["data=indexed", f"data.dir={tmp_path}/first"]).data
    data.blend = [BlendEntry(f"{tmp_path}/{name}/text_document") for name in ("first", "second")]
    return data


def test_every_dataset_of_a_blend_is_looked_at(small_data: tuple[str, ...], tmp_path: Path) -> None:
    data = _two(small_data, tmp_path)
    check_prepared(data, 512)
    index = tmp_path / "second/text_document.idx"
    whole = index.read_bytes()
    index.write_bytes(b"X" + whole[1:])
    with pytest.raises(DataError, match=r"second/text_document\.idx is not a whole index"):
        check_prepared(data, 512)
    index.write_bytes(whole)
    (tmp_path / "second/manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"second/manifest\.json is damaged"):
        check_prepared(data, 512)


def test_the_vocabulary_of_a_blend_is_compared_not_its_file(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """A tokenizer.json that was written again by another library means the same; a dataset without one is taken."""
    data = _two(small_data, tmp_path)
    own = tmp_path / "second/tokenizer.json"
    (tmp_path / "second/manifest.json").unlink()
    content = json.loads(own.read_text())
    own.write_text(json.dumps(content, indent=4))
    check_prepared(data, 512)
    vocabulary = content["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    own.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"whose vocabulary is not that of .*first/tokenizer\.json"):
        check_prepared(data, 512)
    own.unlink()
    check_prepared(data, 512)


def test_a_tokenizer_of_a_blend_needs_the_same_end_of_document(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """Its files may name none, where data.eod_token does."""
    data = _two(small_data, tmp_path)
    token = "the end"
    for name in ("first", "second"):
        path = tmp_path / name / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"][0]["content"] = token
        content["model"]["vocab"] = {
            token if number == 0 else text: number for text, number in content["model"]["vocab"].items()
        }
        path.write_text(json.dumps(content, indent=1 if name == "first" else 2))
        (tmp_path / name / "manifest.json").unlink()
    data.eod_token = token
    check_prepared(data, 512)


def test_the_vocabulary_without_a_manifest(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """A tokenizer at data.dir is that of a dataset of another program; where moe-data makes one, it is replaced."""
    data = _two(small_data, tmp_path)
    (tmp_path / "first/manifest.json").unlink()
    assert known_vocabulary(data) == 512
    assert known_vocabulary(replace(data, source="files", path="text", tokenizer_vocab_size=700)) == 700
    (tmp_path / "first/tokenizer.json").unlink()
    assert known_vocabulary(data) is None
    (tmp_path / "second/tokenizer.json").unlink()
    assert known_vocabulary(replace(data, dir=f"{tmp_path}/second")) is None


def test_all_bytes_are_compared_whatever_was_compared_before(small_data: tuple[str, ...], tmp_path: Path) -> None:
    data = _two(small_data, tmp_path)
    model = ModelConfig(vocab_size=512)
    assert examine(data, model, progress=False) == []
    file = tmp_path / "second/text_document.bin"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert examine(data, model, progress=False) == []
    with pytest.raises(DataError, match=r"second/text_document\.bin is damaged"):
        compare(data, progress=False)


@pytest.mark.parametrize(("progress", "terminal"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_bar_is_shown_on_a_terminal(progress: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", terminal)
    assert _bar(progress).disable == (not (progress and terminal))
