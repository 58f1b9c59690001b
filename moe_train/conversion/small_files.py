"""Files next to the weights of an exported model: its tokenizer, its generation settings, the code it came with.

A run's documents end with one token, and so does text that transformers' `generate` makes of its weights: config.json,
generation_config.json and tokenizer_config.json all name that token. No torch import.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.schema import DataConfig
from moe_train.conversion import hf_config as config
from moe_train.files import untrusted
from moe_train.formats import safetensors
from moe_train.formats.run_directory import BEGAN, MANIFEST, step_of
from parallel.errors import CheckpointError

Json = dict[str, Any]
KEPT = "hf"
"""Folder of a Megatron checkpoint with the small files of the Hugging Face one that it came from."""
GENERATION = "generation_config.json"

_TOKENIZER, _TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_OF_A_TOKENIZER = {
    _TOKENIZER, _TOKENIZER_CONFIG, _SPECIAL_TOKENS, GENERATION, "chat_template.jinja", "chat_template.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenization.json",
}  # fmt: skip
_LARGEST_KEPT_BYTES = 64 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_UNKNOWN: Json = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class SmallFiles:
    """The small files that go next to the weights."""

    copied: dict[str, Path] = field(default_factory=dict)
    """Name -> source."""
    made: dict[str, bytes] = field(default_factory=dict)
    """Name -> content."""
    tokens: Json = field(default_factory=dict)
    """Keys of config.json that name special tokens, where they are not those of `original`."""
    original: config.Json | None = None
    """config.json that the weights once came with."""


def accompanying(directory: Path) -> list[Path]:
    """Files next to weights that a copy should have too: tokenizer, generation settings, model code."""
    if not directory.is_dir():
        return []
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (safetensors.INDEX, MANIFEST)
        and not path.name.endswith(_WEIGHTS)
        and path.stat().st_size <= _LARGEST_KEPT_BYTES
    ]


def of_directory(directory: Path) -> SmallFiles:
    """The files of a Hugging Face directory, unchanged."""
    original = config.read(directory) if (directory / config.FILE).is_file() else None
    return SmallFiles({path.name: path for path in accompanying(directory)}, original=original)


def keep(weights: Path | None, run_dir: Path) -> None:
    """Copy the small files of the first `weights` of a run to its directory: later they may be gone.

    They replace those of an earlier run there. None: the run began with random weights.

    Raises:
        OSError: they cannot be written.
    """
    origin, target = None if weights is None else origin_of(weights), run_dir / BEGAN
    partial = run_dir / f".{BEGAN}.partial"
    for old in (partial, target):
        if origin != old and os.path.lexists(old):
            shutil.rmtree(old)  # it refuses a symbolic link
    if origin is None or origin == target:
        return
    partial.mkdir(parents=True)
    for path in accompanying(origin):
        shutil.copyfile(path, partial / path.name)
    os.rename(partial, target)


def of_run(model: ModelConfig, data: DataConfig, weights: Path | None) -> SmallFiles:
    """Those of weights that were trained on `data`, and that began as those of `origin_of(weights)`.

    The tokenizer is that of the data. What else came with the first weights is kept; of their tokenizer and generation
    settings only where it is the same tokenizer.

    Raises:
        CheckpointError, DataError: a file is damaged, or the tokenizer has tokens that the model does not have.
    """
    origin = None if weights is None else origin_of(weights)
    began = of_directory(origin) if origin else SmallFiles()
    source = Path(data.dir) / _TOKENIZER
    if not source.is_file():
        return began if origin else SmallFiles(tokens=dict(_UNKNOWN))
    same = _TOKENIZER in began.copied and began.copied[_TOKENIZER].read_bytes() == source.read_bytes()
    copied = {name: path for name, path in began.copied.items() if same or name not in _OF_A_TOKENIZER}
    return _with_tokenizer(copied, began.original, model, data, same)


def origin_of(weights: Path) -> Path | None:
    """Where the small files of weights are: next to them in Hugging Face format, in a checkpoint that was converted
    from there, or in the directory of a run that began with such weights. None where there are none.
    """
    run_dir = weights.parent if step_of(weights.name) >= 0 else weights
    run_dir = run_dir.parent if run_dir.name == "checkpoints" else run_dir
    places = (weights, weights / KEPT, run_dir / BEGAN)
    return next((path for path in places if (path / config.FILE).is_file()), None)


def _with_tokenizer(
    copied: dict[str, Path], original: Json | None, model: ModelConfig, data: DataConfig, same: bool
) -> SmallFiles:
    from moe_train.data.tokenizer import companions, load_tokenizer

    tokenizer = load_tokenizer(data)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, and model.vocab_size is {model.vocab_size}",
            "set data.dir to the dataset that it was trained on",
        )
    if not same:
        copied |= {path.name: path for path in (tokenizer.path, *companions(tokenizer.path))}
    special = tokenizer.special
    pad = tokenizer.token_id(special.pad)
    old = (original or {}) if same else {}
    eos = _ending_with(tokenizer.eod, old.get("eos_token_id"))
    bos = tokenizer.bos if old.get("bos_token_id") is None else old["bos_token_id"]
    # Without a token for padding none is named here: an embedding's padding row gets no gradient.
    tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": old.get("pad_token_id", pad)}
    texts = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eod_token}
    texts |= {"pad_token": special.pad or tokenizer.eod_token, "unk_token": special.unk}
    new_files = _tokenizer_settings(copied, {key: text for key, text in texts.items() if text}, model, data)
    if data.prepend_bos and tokenizer.bos_token and not special.adds_bos:
        new_files[_TOKENIZER] = tokenizer.beginning_with(tokenizer.bos_token).encode()
    generation = _object(copied.get(GENERATION))
    if tokenizer.eod not in _listed(generation.get("eos_token_id")):
        usual = {"bos_token_id": bos, "pad_token_id": tokenizer.eod if pad is None else pad}
        settings = usual | generation | {"eos_token_id": _ending_with(tokenizer.eod, generation.get("eos_token_id"))}
        new_files[GENERATION] = _json({key: value for key, value in settings.items() if value is not None})
    return SmallFiles({n: p for n, p in copied.items() if n not in new_files}, new_files, tokens, original)


def _tokenizer_settings(
    copied: dict[str, Path], texts: dict[str, str], model: ModelConfig, data: DataConfig
) -> dict[str, bytes]:
    """tokenizer_config.json and special_tokens_map.json, where they do not name the tokens of the data already."""
    tokenizer_config, mapped = _object(copied.get(_TOKENIZER_CONFIG)), _object(copied.get(_SPECIAL_TOKENS))
    named = {**_texts(mapped), **_texts(tokenizer_config)}
    if "tokenizer_class" in tokenizer_config and all(
        named.get(key) == texts[key] for key in ("bos_token", "eos_token") if key in texts
    ):
        return {}
    changed: Json = {key: text for key, text in texts.items() if named.get(key) != text}
    usual: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    return {
        _TOKENIZER_CONFIG: _json(usual | mapped | tokenizer_config | changed),
        _SPECIAL_TOKENS: _json(texts | mapped | {key: changed[key] for key in texts if key in changed}),
    }


def _ending_with(eod: int, given: Any) -> Any:
    """Token ids that end a text: those that are given, with the one that ended the documents of the run."""
    others = _listed(given)
    if eod in others:
        return given
    return [eod, *others] if others else eod


def _listed(given: Any) -> list[int]:
    if given is None:
        return []
    return list(given) if isinstance(given, list) else [given]


def _texts(values: Json) -> dict[str, str]:
    """Special tokens by role, of which files hold the text or an object with it."""
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: text for key, text in contents.items() if isinstance(text, str)}


def _object(path: Path | None) -> Json:
    if path is None:
        return {}
    try:
        value = untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", "restore the file from a copy, or remove it"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", "restore the file from a copy, or remove it")
    return value


def _json(values: Json) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
