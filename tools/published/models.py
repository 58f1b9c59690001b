"""From the name of a model in a table to its architecture."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.model import ModelConfig
from moe_train.config.rules.values import check_value
from moe_train.config.walk import all_fields
from moe_train.files import untrusted
from parallel.errors import ConfigError
from parallel.suggest import Impossible

OWN = (Path(CONF_DIR) / "model", Path(__file__).parent / "validation_models")
# Names for the same architecture, after `_key`.
SAME = {
    "llama31": "llama3", "nemotron4": "nemotron", "olmoe1b7b": "olmoe7b", "qwen257b": "qwen2moe57b",
    "glm45355b": "glm4moe355b",
}  # fmt: skip
GATED = (
    8 / 3
)  # inner width over hidden size of a gated feed-forward with the FLOPs of GPT's, which is 4 wide without gate


def find(name: str, directory: str | None = None) -> ModelConfig | None:
    """The architecture of a name, from YAML files of the directory or of this project, or from the shape in the name.

    A file fits where its name begins the other one, without regard to punctuation. The longest wins, in either
    folder; of two that are equally long, the one in `directory`. Where no file fits, the only file whose name begins
    with the other one, down to its size, does ("Qwen3 30B"). None where nothing fits.

    Raises:
        ConfigError: a file does not fit the schema of a model.
    """
    if shaped := _shape(name):
        return shaped
    key, files = _key(name), _files(directory)
    fitting = [own for own in files if own and key.startswith(own)]
    if not fitting and re.search(r"\db$", key):
        longer = [own for own in files if own.startswith(key)]
        fitting = longer if len(longer) == 1 else []
    return load(files[max(fitting, key=len)]) if fitting else None


def _files(directory: str | None) -> dict[str, Path]:
    """The model files by the key of their names; of the same name in several folders, the one in `directory`."""
    files: dict[str, Path] = {}
    for folder in (*((Path(directory),) if directory else ()), *OWN):
        for path in sorted(folder.glob("*.yaml")):
            files.setdefault(_key(path.stem), path)
    return files


@cache
def load(path: Path) -> ModelConfig:
    """The architecture in a YAML file with the fields of `model`, each of its type and within its bounds."""
    known = ", ".join(field.name for field in dataclasses.fields(ModelConfig)[:6])
    remedy = f"use the fields of model: {known}, ... (docs/configuration.md)"
    try:
        values: dict[str, Any] = untrusted.read_yaml(path) or {}
        if not isinstance(values, dict):
            raise TypeError("it is not a mapping")
        values.pop("defaults", None)
        model: ModelConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))  # type: ignore[assignment]
    except (OSError, TypeError, ValueError, OmegaConfBaseException) as error:
        cause, _, _ = str(error).partition("\n ")  # what is indented says where in the text
        raise ConfigError(f"{path}: {' '.join(cause.split())}", remedy) from error
    try:
        for field in dataclasses.fields(model):
            check_value(all_fields()[f"model.{field.name}"], getattr(model, field.name))
    except Impossible as error:
        raise ConfigError(f"{path}: {error.cause}", remedy) from error
    return model


def _key(name: str) -> str:
    """Letters and digits of a name, without what is in brackets."""
    key = re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", name.lower()))
    for other, own in SAME.items():
        key = key.replace(other, own)
    return key


def _shape(name: str) -> ModelConfig | None:
    """A GPT whose name tells its shape: "GPT 175B (96L h12288 a96 V51200)"."""
    match = re.search(r"\((\d+)L h(\d+) (?:a(\d+)|(\d+) heads) V(\d+)\)", name)
    if not match:
        return None
    layers, hidden, active_heads, heads, vocabulary = match.groups()
    return ModelConfig(
        name=name, family="llama", num_layers=int(layers), hidden_size=int(hidden), attention="gqa", num_experts=0,
        ffn_hidden_size=round(int(hidden) * GATED), num_attention_heads=int(active_heads or heads),
        vocab_size=int(vocabulary),
    )  # fmt: skip
