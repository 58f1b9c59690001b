"""Texts whose every token is scored once: windows, mixtures, and what is read from files and datasets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_train.config.schema import DataConfig
from moe_train.data import scoring
from moe_train.data.prepare import prepare
from moe_train.data.scoring import Mixture, ScoredText, Windows
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from parallel.errors import DataError
from tests.data.corpora import config, texts, write_txt

EOD, VOCABULARY = 99, 300


def some_text(*documents: list[int]) -> ScoredText:
    lengths = np.array([len(ids) for ids in documents])
    return ScoredText("some", np.array([token for ids in documents for token in ids]), lengths, None, EOD)


@pytest.mark.parametrize("length", [3, 4, 7, 50])
def test_each_token_is_a_label_once_after_the_token_before_it(length: int) -> None:
    text = some_text([1, 2, 3, 4, EOD], [5, 6, EOD])
    windows = Windows(text, length)
    scored, before = [], []
    for i in range(len(windows)):
        sample = windows[i]
        assert all(len(value) == length for value in sample.values())
        assert sample["position_ids"].tolist() == list(range(length))
        kept = sample["loss_mask"].bool()
        scored += sample["labels"][kept].tolist()
        before += sample["tokens"][kept].tolist()
    assert scored == text.tokens.tolist()
    assert before == [EOD, *text.tokens.tolist()[:-1]]


def test_with_documents_apart_positions_begin_again_and_first_tokens_have_no_context() -> None:
    sample = Windows(some_text([1, 2, EOD], [5, 6, EOD]), 6, reset_at_eod=True)[0]
    assert sample["tokens"].tolist() == [EOD, 1, 2, EOD, 5, 6]
    assert sample["position_ids"].tolist() == [0, 0, 1, 2, 0, 1]
    assert sample["labels"][sample["loss_mask"].bool()].tolist() == [2, EOD, 6, EOD]


def test_samples_of_a_mixture_have_their_source_and_those_that_fill_up_count_for_nothing() -> None:
    first, second = Windows(some_text([1] * 10), 4), Windows(some_text([2] * 3), 4)
    mixture = Mixture([first, second], multiple=3)
    assert (len(mixture), mixture.num_samples) == (6, 4)
    samples = [mixture[i] for i in range(6)]
    assert [sample["source"].unique().tolist() for sample in samples[:4]] == [[0], [0], [0], [1]]
    assert [int(sample["loss_mask"].sum()) for sample in samples] == [4, 4, 2, 3, 0, 0]
    assert first[0]["loss_mask"].sum() == 4
    blend = [{**first[0], "dataset_id": np.int16(1)}, {**first[1], "dataset_id": np.int16(0)}]
    assert [int(Mixture([blend], 1)[i]["source"][0]) for i in range(2)] == [1, 0]
    assert "dataset_id" not in Mixture([blend], 1)[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Tokenizer]:
    directory = tmp_path_factory.mktemp("scored")
    data = config(write_txt(directory / "text", [f"{text}é\n" for text in texts(8)]), directory / "dataset")
    prepare(data, VOCABULARY, progress=False)
    return data, load_tokenizer(data)


def documents(text: ScoredText) -> list[list[int]]:
    return sorted(ids.tolist() for ids in np.split(text.tokens, np.cumsum(text.lengths)[:-1]))


def test_a_dataset_its_prefix_and_its_text_are_the_same_tokens(dataset: tuple[DataConfig, Tokenizer]) -> None:
    data, tokenizer = dataset
    text = scoring.read("a", str(data.path), data, tokenizer, VOCABULARY)
    pair = Path(data.dir) / "text_document"
    size = sum(len(path.read_bytes()) for path in Path(str(data.path)).iterdir())
    assert text.count_bytes(tokenizer) == text.num_bytes == size
    for path in (data.dir, str(pair), f"{pair}.bin", f"{pair}.idx"):
        found = scoring.read("a", path, data, tokenizer, VOCABULARY)
        assert documents(found) == documents(text)  # moe-data shuffles them
        assert found.num_bytes is None
        assert found.count_bytes(tokenizer) == size
    length = int(text.lengths[0])
    part = text.first(length + 3)
    assert part.lengths.tolist() == [length, 3]
    decoded = tokenizer.decode(text.tokens[:length].tolist()) + tokenizer.decode(text.tokens[length:][:3].tolist())
    assert part.count_bytes(tokenizer) == len(decoded.encode())
    assert text.first(10**9) is text


def test_a_file_is_one_document_and_repeated_records_count(
    dataset: tuple[DataConfig, Tokenizer], tmp_path: Path
) -> None:
    data, tokenizer = dataset
    long = "a line of text\n\n" * 2000  # training would cut it into pieces
    (tmp_path / "long.txt").write_text(long)
    text = scoring.read("long", str(tmp_path / "long.txt"), data, tokenizer, VOCABULARY)
    assert text.lengths.tolist() == [len(text.tokens)]
    assert tokenizer.decode(text.tokens.tolist()) == long
    (tmp_path / "twice.jsonl").write_text(2 * (json.dumps({"text": "again"}) + "\n"))
    twice = scoring.read("twice", str(tmp_path / "twice.jsonl"), data, tokenizer, VOCABULARY)
    assert len(twice.lengths) == 2
    assert twice.num_bytes == 10
    begins = scoring.read("bos", str(tmp_path / "twice.jsonl"), replace(data, append_eod=False), tokenizer, VOCABULARY)
    assert begins.tokens.tolist() == 2 * tokenizer.encode("again")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("absent.txt", None, "absent.txt has no .txt, .md"),
        ("empty.txt", "", "file; 1 empty files; name a file, directory or glob"),
        ("text.bin", "x", "text.bin is of an unknown kind; name a file, directory or glob of text, a dataset of"),
        ("text.jsonl", "{}\n", "line 1 has no text under 'text' (it has no field); set data.text_key"),
    ],
)
def test_what_is_no_text_is_refused_by_its_path(
    name: str, content: str | None, told: str, dataset: tuple[DataConfig, Tokenizer], tmp_path: Path
) -> None:
    data, tokenizer = dataset
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        scoring.read("a", str(tmp_path / name), data, tokenizer, VOCABULARY)
    assert told in f"{caught.value.cause}; {caught.value.remedy}"
    assert str(tmp_path) in caught.value.cause


def test_tokens_that_the_model_does_not_have_are_refused(dataset: tuple[DataConfig, Tokenizer]) -> None:
    data, tokenizer = dataset
    with pytest.raises(DataError, match=r"has token id \d+, but model.vocab_size=200"):
        scoring.read("a", data.dir, data, tokenizer, 200)
