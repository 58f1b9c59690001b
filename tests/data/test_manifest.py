"""Whether files of a dataset have changed since they were made, and what a model needs to know of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import job
from moe_train.config.composition.compose import compose
from moe_train.config.schema import BlendEntry, DataConfig
from moe_train.data import manifest, prepare
from moe_train.data.index_file import read_index
from moe_train.data.tokenizer import train_tokenizer
from parallel.errors import DataError
from tests.data.corpora import config, texts, write_txt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("manifest")
    data = config(write_txt(root / "text", texts(60)), root / "data")
    prepare.prepare(data, 300, progress=False)
    return data


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be compared."""
    names: list[str] = []
    compute = manifest.sha256_of

    def counted(file: Path, *args: Any) -> str:
        names.append(file.name)
        return compute(file, *args)

    monkeypatch.setattr(manifest, "sha256_of", counted)
    return names


FILES = ["text_document.bin", "text_document.idx", "tokenizer.json"]


def copy(made: DataConfig, directory: Path) -> DataConfig:
    shutil.copytree(made.dir, directory, ignore=shutil.ignore_patterns("cache"))
    return replace(made, dir=str(directory))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_files_are_compared_once_until_they_change(made: DataConfig, tmp_path: Path, read: list[str]) -> None:
    assert manifest.verify(made) == []
    assert read == [], "they are those that were written"
    data = copy(made, tmp_path / "copy")
    manifest.verify(data)
    assert sorted(read) == FILES
    manifest.verify(data)
    assert len(read) == len(FILES)
    flip(tmp_path / "copy" / FILES[0])
    for _ in range(2):
        with pytest.raises(DataError, match=r"text_document\.bin is damaged.*delete .* and run moe-data"):
            manifest.verify(data)
    assert read[len(FILES) :] == [FILES[0]] * 2
    manifest.verify(replace(data, verify="size"))
    assert len(read) == len(FILES) + 2


def test_a_large_dataset_does_not_hold_up_the_start_and_that_is_said(
    made: DataConfig, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MOST_VERIFIED_BYTES", 1000)
    data = copy(made, tmp_path / "copy")
    (warning,) = manifest.verify(data)
    assert "not compared with their checksums before the start: run moe-data once, or set data.verify=full" in warning
    assert read == []
    assert manifest.verify(replace(data, verify="full")) == []
    assert sorted(read) == FILES
    assert manifest.verify(data) == [], "that is remembered"


def test_all_bytes_can_be_compared_again(made: DataConfig, tmp_path: Path) -> None:
    """Of a medium that loses bits nothing tells but the bytes."""
    data = copy(made, tmp_path / "copy")
    manifest.verify(data)
    file = tmp_path / "copy" / FILES[0]
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest.verify(data)
    with pytest.raises(DataError, match=r"text_document\.bin is damaged"):
        manifest.verify(data, again=True)


def test_the_datasets_of_a_blend_are_compared_too_and_those_without_a_manifest_are_taken(
    made: DataConfig, tmp_path: Path
) -> None:
    other, foreign = copy(made, tmp_path / "other"), copy(made, tmp_path / "foreign")
    Path(foreign.dir, "manifest.json").unlink()
    flip(Path(foreign.dir, FILES[0]))
    blend = [BlendEntry(f"{one.dir}/text_document", 1) for one in (made, other, foreign)]
    data = replace(made, source="none", path=None, blend=blend)
    assert manifest.verify(data) == []
    assert manifest.known_tokens(data) == 3 * read_index(f"{made.dir}/text_document").tokens
    flip(Path(other.dir, FILES[1]))
    with pytest.raises(DataError, match=r"other/text_document\.idx is damaged"):
        manifest.verify(data)


def test_a_dataset_of_a_blend_that_another_tokenizer_made_is_refused(made: DataConfig, tmp_path: Path) -> None:
    other = config(write_txt(tmp_path / "text", texts(40, seed=5)), tmp_path / "other")
    prepare.prepare(other, 300, progress=False)
    blend = [BlendEntry(f"{one.dir}/text_document") for one in (made, other)]
    data = replace(made, source="none", path=None, blend=blend)
    with pytest.raises(DataError, match=r"other/text_document of data\.blend was made with .*other/tokenizer\.json"):
        prepare.check_prepared(data, 300)
    shutil.copyfile(Path(made.dir, "tokenizer.json"), Path(other.dir, "tokenizer.json"))
    prepare.check_prepared(data, 300)


def run_config(data: DataConfig, *overrides: str) -> Any:
    return compose(["data=indexed", f"data.dir={data.dir}", "telemetry.progress=false", *overrides])


def test_a_vocabulary_below_the_tokenizers_is_refused_before_any_process_starts(made: DataConfig) -> None:
    """Also where the padding of the embedding would have room for its tokens."""
    with pytest.raises(DataError, match=r"has 300 tokens, model\.vocab_size only 299; set model\.vocab_size=300"):
        job.prepare_data(run_config(made, "model.vocab_size=299"))


def test_a_vocabulary_far_above_the_tokenizers_is_said_with_its_cost(
    made: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    job.prepare_data(run_config(made, "model.vocab_size=384"))
    assert capsys.readouterr().err == ""
    job.prepare_data(run_config(made, "model.vocab_size=1024", "model.hidden_size=64"))
    unused = 2 * (1024 - 384) * 64
    told = capsys.readouterr().err
    assert told.startswith(f"warning: model.vocab_size=1024 is far above the 300 tokens of the tokenizer: {unused:,} ")
    assert told.count("\n") == 1


def test_the_vocabulary_is_known_before_the_dataset_is_made(made: DataConfig, tmp_path: Path) -> None:
    new = replace(made, dir=str(tmp_path / "new"), tokenizer_vocab_size=280)
    assert prepare.known_vocabulary(new) == 280
    train_tokenizer(texts(60), 290, tmp_path / "tokenizer.json")
    assert prepare.known_vocabulary(replace(new, tokenizer=str(tmp_path))) == 290
    assert prepare.known_vocabulary(made) == 300
    assert prepare.known_vocabulary(replace(new, source="none", path=None)) is None
    assert manifest.known_tokens(new) is None
    assert manifest.known_tokens(made) == manifest.read_manifest(made)["tokens"]
