from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from moe_train.data.tokenizer import (
    END_OF_DOCUMENT,
    Tokenizer,
    _recorded_tokens,
    find_tokenizer,
    load_tokenizer,
    special_tokens,
    train_tokenizer,
)
from parallel.errors import DataError
from tests.data.corpora import config, texts

ANY = "def f(x):\n\treturn  x  # ünï 漢字 🙂 \x00 <|endoftext|> </s>\r\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts(200), 400, path)
    return path


def changed(trained: Path, directory: Path, *tokens: str, settings: object = None) -> Path:
    """The trained tokenizer with other special tokens, as a Hugging Face directory."""
    tokenizer = json.loads(trained.read_text())
    highest = max(tokenizer["model"]["vocab"].values())
    tokenizer["added_tokens"] = [
        {**tokenizer["added_tokens"][0], "content": t, "id": highest + 1 + i} for i, t in enumerate(tokens)
    ]
    tokenizer["model"]["vocab"]["<first>"] = tokenizer["model"]["vocab"].pop(END_OF_DOCUMENT)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(
            settings if isinstance(settings, str) else json.dumps(settings)
        )
    return directory / "tokenizer.json"


def test_any_text_comes_back_and_text_is_never_taken_for_the_end_of_a_document(trained: Path) -> None:
    tokenizer = Tokenizer(trained)
    ids = tokenizer.encode(ANY)
    assert tokenizer.decode(ids) == ANY
    assert tokenizer.eod not in ids
    assert tokenizer.encode_batch([ANY, "", "x"]) == [ids, [], tokenizer.encode("x")]
    assert tokenizer.decode([*ids, tokenizer.eod]) == ANY, "the end token has no text"


def test_training_compresses_and_keeps_to_its_size(trained: Path) -> None:
    tokenizer = Tokenizer(trained)
    assert 257 < tokenizer.vocab_size <= 400
    text = "".join(texts(50, seed=1))
    assert len(tokenizer.encode(text)) < 0.5 * len(text.encode())


def test_training_gives_the_same_bytes_for_any_number_of_threads(trained: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.data.corpora import texts;"
        "from moe_train.data.tokenizer import train_tokenizer;"
        "train_tokenizer(texts(200), 400, pathlib.Path(sys.argv[1]))"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other.json")],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert (tmp_path / "other.json").read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("named", ["<stop>", {"content": "<stop>", "special": True}])
def test_the_end_token_of_a_hugging_face_directory_comes_first(trained: Path, tmp_path: Path, named: object) -> None:
    path = changed(trained, tmp_path, "</s>", "<stop>", settings={"eos_token": named})
    assert find_tokenizer(str(tmp_path)) == find_tokenizer(str(path)) == path
    tokenizer = Tokenizer(path)
    assert tokenizer.eod == tokenizers.Tokenizer.from_file(str(path)).token_to_id("<stop>")


def test_the_recorded_tokens_of_a_damaged_manifest_are_none(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "[]", '{"special_tokens": []}'):
        (tmp_path / "manifest.json").write_text(text)
        assert _recorded_tokens(tmp_path / "manifest.json") == {}


def test_a_vocabulary_with_gaps_needs_room_up_to_its_last_token(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1000}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").vocab_size == 1001


def test_a_well_known_end_token_is_found_without_a_configuration(trained: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(changed(trained, tmp_path, "<other>", "</s>"))
    assert tokenizer.eod == tokenizer.vocab_size - 1


def test_caches_are_named_after_what_a_tokenizer_is_and_not_where_it_lies(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.read_bytes())
    copy = Tokenizer(tmp_path / "tokenizer.json").unique_identifiers
    assert copy == Tokenizer(trained).unique_identifiers
    other = Tokenizer(changed(trained, tmp_path, "</s>")).unique_identifiers
    assert json.dumps(other) != json.dumps(copy)


def test_tokenizers_that_cannot_be_used_are_named(trained: Path, tmp_path: Path) -> None:
    for settings, tokens, cause in (
        (None, ["<other>"], "defines no end-of-document token"),
        ({"eos_token": "<absent>"}, ["</s>"], "has eos_token '<absent>', which tokenizer.json has not"),
        ("{", ["</s>"], "tokenizer_config.json is not a tokenizer's configuration"),
        ("[]", ["</s>"], "tokenizer_config.json is not a tokenizer's configuration"),
        ("[" * 100_000, ["</s>"], "tokenizer_config.json is not a tokenizer's configuration"),
    ):
        with pytest.raises(DataError) as caught:
            Tokenizer(changed(trained, tmp_path, *tokens, settings=settings))
        assert cause in str(caught.value)
        assert caught.value.remedy
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer: .*named pipe"):
        special_tokens(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer=.*none has no tokenizer\.json"):
        find_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"has no tokenizer\.json; make the dataset with moe-data"):
        load_tokenizer(config(tmp_path, tmp_path / "none"))


def with_post_processor(trained: Path, directory: Path, **files: object) -> Path:
    """A tokenizer with <s> (400), <stop> (401) and </s> (402), which puts <s> before a text, and files next to it."""
    directory.mkdir()
    content = json.loads(changed(trained, directory, "<s>", "<stop>", "</s>").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [content["added_tokens"][0]["id"]], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory / "tokenizer.json"


NAMED = {"added_tokens_decoder": {}, "bos_token": "<stop>", "eos_token": "</s>", "pad_token": "<s>"}
MAP = {"bos_token": {"content": "<s>"}, "eos_token": "<stop>", "pad_token": "</s>"}


@pytest.mark.parametrize(
    ("name", "config"),
    [("map alone", None), ("old config", {"eos_token": "</s>"}), ("new config", NAMED)],
)
def test_special_tokens_are_those_that_transformers_finds(
    trained: Path, tmp_path: Path, name: str, config: dict[str, object] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    files = {} if config is None else {"tokenizer_config": config}
    path = with_post_processor(trained, tmp_path / name, special_tokens_map=MAP, **files)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(path.parent))
    ours = special_tokens(path)
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert ours == special_tokens(path.parent) == Tokenizer(path).special


def test_the_map_of_special_tokens_names_the_end_where_the_configuration_does_not(
    trained: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(with_post_processor(trained, tmp_path / "a", special_tokens_map=MAP))
    assert (tokenizer.eod_token, tokenizer.bos_token) == ("<stop>", "<s>")
    assert tokenizer.eod == tokenizer.bos + 1
    assert tokenizer.special.adds_bos
    assert not Tokenizer(with_post_processor(trained, tmp_path / "b", tokenizer_config={"bos_token": "<s>",
                         "add_bos_token": False})).special.adds_bos  # fmt: skip
    wrong = with_post_processor(trained, tmp_path / "c", special_tokens_map={"eos_token": "<absent>"})
    with pytest.raises(DataError, match=r"special_tokens_map\.json has eos_token '<absent>'"):
        Tokenizer(wrong)


def test_special_tokens_can_be_chosen_and_parsed(trained: Path, tmp_path: Path) -> None:
    path = with_post_processor(trained, tmp_path / "a", special_tokens_map=MAP)
    plain, parsing = Tokenizer(path), Tokenizer(path, "</s>", "<stop>", parse_special_tokens=True)
    assert (parsing.eod, parsing.bos) == (plain.eod + 1, plain.eod)
    text = "a <stop> b"
    assert plain.eod not in plain.encode(text)
    assert plain.decode(plain.encode(text)) == text
    assert parsing.encode(text).count(plain.eod) == 1
    assert parsing.encode_batch([text]) == [parsing.encode(text)]
    assert plain.bos not in plain.encode(text), "its own post-processor adds nothing"
    for option in ("eod", "bos"):
        with pytest.raises(DataError, match=rf"data\.{option}_token=<absent> is not a token of .*; correct data\."):
            Tokenizer(path, **{f"{option}_token": "<absent>"})
