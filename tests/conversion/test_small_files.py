"""What an exported run has next to its weights: transformers loads the tokenizer, and `generate` stops by itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_train.config.composition.compose import compose
from moe_train.config.model import ModelConfig
from moe_train.config.schema import DataConfig
from moe_train.conversion import hf_config as config
from moe_train.conversion import small_files
from moe_train.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer
from parallel.errors import CheckpointError
from tests.conversion import models
from tests.conversion.convert import convert

TEXTS = [f"Number {n} is here, and {n + 1} follows." for n in range(200)]
MODEL = ModelConfig(vocab_size=300)


def make_tokenizer(directory: Path, *special: str, **files: Any) -> DataConfig:
    """A directory like that of a dataset, with `files` (without .json) next to its tokenizer."""
    directory.mkdir(parents=True)
    path = directory / "tokenizer.json"
    train_tokenizer(TEXTS, 280, path)
    if special:
        with_more = tokenizers.Tokenizer.from_file(str(path))
        with_more.add_special_tokens(list(special))
        with_more.save(str(path))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return DataConfig(dir=str(directory))


def written(found: small_files.SmallFiles, directory: Path) -> Path:
    """The files in a directory of their own."""
    directory.mkdir()
    for name, path in found.copied.items():
        shutil.copy(path, directory / name)
    for name, content in found.made.items():
        (directory / name).write_bytes(content)
    return directory


def of_a_run(directory: Path, data: DataConfig, root: Path) -> Path:
    """A checkpoint with the weights at `directory` as a run on `data` would leave it."""
    path = root / "step_00000001"
    convert(directory, path)
    shutil.rmtree(path / small_files.KEPT)
    (path / "manifest.json").unlink()
    saved = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(saved | {"data": asdict(data)}))
    return path


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "olmoe"])
def test_generate_stops_at_the_end_of_a_document(name: str, tmp_path: Path) -> None:
    """The weights always say 0, which is the token that ends documents; each family's class has another default."""
    data = make_tokenizer(tmp_path / "data")
    models.save(name, tmp_path / "hf")
    models.edit(tmp_path / "hf", lambda held: held["lm_head.weight"].zero_())
    convert(of_a_run(tmp_path / "hf", data, tmp_path), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == load_tokenizer(data).eod == 0
    prompt = tokenizer("Number 7", return_tensors="pt")
    found = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert found[0].tolist() == [*prompt["input_ids"][0].tolist(), 0]


def test_the_tokenizer_of_transformers_is_that_of_the_data(tmp_path: Path) -> None:
    data = make_tokenizer(tmp_path / "data")
    ours = load_tokenizer(data)
    theirs = AutoTokenizer.from_pretrained(written(small_files.of_run(MODEL, data, None), tmp_path / "out"))
    for text in [*TEXTS[:20], " two  spaces\n\tand a tab", "äöü 漢字 🙂", ""]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token == theirs.pad_token == END_OF_DOCUMENT
    assert theirs.bos_token is None
    assert theirs.model_max_length == MODEL.max_position_embeddings


def test_without_a_tokenizer_no_token_ends_a_text(tmp_path: Path) -> None:
    """The default of DeepSeek-V3's class is 1, which is any word of another tokenizer."""
    found = small_files.of_run(MODEL, DataConfig(dir=str(tmp_path)), None)
    assert found.tokens == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert not found.copied
    assert not found.made


@pytest.mark.parametrize("file", ["special_tokens_map", "tokenizer_config"])
def test_the_named_end_is_the_one_that_is_exported(file: str, tmp_path: Path) -> None:
    """In either file, as text or as an object."""
    data = make_tokenizer(
        tmp_path / "data", "<end>", "<begin>", "<pad>",
        **{file: {"eos_token": {"content": "<end>"}, "bos_token": "<begin>", "pad_token": "<pad>"}},
    )  # fmt: skip
    ours = load_tokenizer(data)
    found = small_files.of_run(MODEL, data, None)
    ids = {name: ours.token_id(f"<{text}>") for name, text in (("eos", "end"), ("bos", "begin"), ("pad", "pad"))}
    assert found.tokens == {f"{name}_token_id": number for name, number in ids.items()}
    assert json.loads(found.made["generation_config.json"]) == found.tokens
    theirs = AutoTokenizer.from_pretrained(written(found, tmp_path / "out"))
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == ("<end>", "<begin>", "<pad>")


def test_a_chosen_end_replaces_the_named_one(tmp_path: Path) -> None:
    data = make_tokenizer(
        tmp_path / "data", "<end>", "<turn>",
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<turn>"},
    )  # fmt: skip
    data.eod_token = "<end>"
    found = small_files.of_run(MODEL, data, None)
    assert found.tokens["eos_token_id"] == load_tokenizer(data).eod
    assert AutoTokenizer.from_pretrained(written(found, tmp_path / "out")).eos_token == "<end>"


def test_a_beginning_that_the_documents_had_is_added_to_prompts(tmp_path: Path) -> None:
    data = make_tokenizer(tmp_path / "data", "<begin>", special_tokens_map={"bos_token": "<begin>"})
    data.prepend_bos = True
    found = small_files.of_run(MODEL, data, None)
    ours, theirs = load_tokenizer(data), AutoTokenizer.from_pretrained(written(found, tmp_path / "out"))
    assert theirs("Number 7")["input_ids"] == [ours.bos, *ours.encode("Number 7")]


def first_weights(data: DataConfig, directory: Path, **settings: Any) -> Path:
    """A chat model of the same tokenizer: two tokens end its texts, and it has a template and code of its own."""
    shutil.copytree(data.dir, directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "modeling_own.py").write_text("# code")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0], "temperature": 0.6}))
    written = config.to_hf(compose(["model=tiny"]).model, "bfloat16")
    (directory / "config.json").write_text(json.dumps(written | {"eos_token_id": [5, 0], "bos_token_id": 7} | settings))
    return directory


def test_what_came_with_the_first_weights_stays_with_their_tokenizer(tmp_path: Path) -> None:
    data = make_tokenizer(tmp_path / "data")
    origin = first_weights(data, tmp_path / "origin")
    found = small_files.of_run(MODEL, data, origin)
    assert {"chat_template.jinja", "modeling_own.py", "generation_config.json"} <= found.copied.keys()
    assert found.tokens["eos_token_id"] == [5, 0]  # 0 ends documents too
    assert found.tokens["bos_token_id"] == 7


def test_what_came_with_the_first_weights_is_kept_when_they_are_gone(tmp_path: Path) -> None:
    data, run_dir = make_tokenizer(tmp_path / "data"), tmp_path / "run"
    origin = first_weights(data, tmp_path / "origin")
    (origin / "model.safetensors").write_bytes(b"large")
    before = small_files.of_run(MODEL, data, origin)
    small_files.keep(origin, run_dir)
    shutil.rmtree(origin)
    for place in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints/step_00000010"):
        after = small_files.of_run(MODEL, data, place)
        assert after.copied.keys() == before.copied.keys()
        assert (after.made, after.tokens, after.original) == (before.made, before.tokens, before.original)
    assert [path.name for path in run_dir.iterdir()] == ["init_from"]
    assert not (run_dir / "init_from/model.safetensors").exists()

    small_files.keep(run_dir / "checkpoints/step_00000010", tmp_path / "other")  # a run from weights of the first one
    assert (tmp_path / "other/init_from/chat_template.jinja").is_file()
    small_files.keep(None, run_dir)  # another run, with random weights
    assert small_files.origin_of(run_dir) is None


def test_a_conversion_says_where_the_first_weights_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, told = make_tokenizer(tmp_path / "data"), "warning: init_from=gone is gone: the files that came with its "
    models.save("llama", tmp_path / "hf")
    run_dir = tmp_path / "run"
    path = of_a_run(tmp_path / "hf", data, run_dir / "checkpoints")
    saved = yaml.safe_load((path / "config.yaml").read_text()) | {"init_from": "gone", "run_dir": str(run_dir)}
    (path / "config.yaml").write_text(yaml.safe_dump(saved))
    convert(path, tmp_path / "without")
    assert told in capsys.readouterr().err
    (tmp_path / "hf/modeling_own.py").write_text("# code")
    small_files.keep(tmp_path / "hf", run_dir)
    moved = shutil.move(path, tmp_path / "step_00000001")  # as checkpoint.dir has it
    convert(moved, tmp_path / "with")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "with/modeling_own.py").is_file()


def test_only_the_run_that_began_with_weights_has_what_came_with_them(tmp_path: Path) -> None:
    first_weights(make_tokenizer(tmp_path / "data"), tmp_path / "init_from")
    assert small_files.origin_of(tmp_path / "run") is None
    assert small_files.origin_of(tmp_path / "run/checkpoints") is None


def test_an_end_that_the_first_weights_did_not_have_is_added(tmp_path: Path) -> None:
    data = make_tokenizer(tmp_path / "data")
    origin = first_weights(data, tmp_path / "origin", eos_token_id=5)
    (origin / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.6}))
    found = small_files.of_run(MODEL, data, origin)
    assert found.tokens["eos_token_id"] == [0, 5]
    generation = json.loads(found.made["generation_config.json"])
    assert generation["eos_token_id"] == [0, 5]
    assert generation["temperature"] == 0.6


def test_of_another_tokenizer_only_the_code_stays(tmp_path: Path) -> None:
    origin = first_weights(make_tokenizer(tmp_path / "theirs", "<other>"), tmp_path / "origin")
    found = small_files.of_run(MODEL, make_tokenizer(tmp_path / "data"), origin)
    assert "modeling_own.py" in found.copied
    assert "chat_template.jinja" not in found.copied
    assert found.tokens == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    assert found.copied["tokenizer.json"] == tmp_path / "data" / "tokenizer.json"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    data = make_tokenizer(tmp_path / "data")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 280 tokens, and model\.vocab_size is 260"):
        small_files.of_run(ModelConfig(vocab_size=260), data, None)


def test_a_conversion_to_megatron_and_back_loses_no_small_file(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "hf")
    first_weights(make_tokenizer(tmp_path / "data"), tmp_path / "first")
    for path in (tmp_path / "first").iterdir():
        if path.name != "config.json":
            shutil.copy(path, tmp_path / "hf")
    models.edit(tmp_path / "hf", lambda held: None, eos_token_id=[5, 0], pad_token_id=9)
    convert(tmp_path / "hf", tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    for path in (tmp_path / "hf").iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert before[key] == after[key]
    with torch.no_grad():
        ids = torch.arange(20)[None]
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "back"))
        assert torch.equal(one(ids).logits, other(ids).logits)
