"""Small corpora for the tests of data."""

from __future__ import annotations

import os
import random
from pathlib import Path

from moe_train.config.schema import DataConfig

WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"]


def texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """`count` different documents of random words, each with its number."""
    draw = random.Random(seed)
    return [f"document {seed} {i}: {' '.join(draw.choices(WORDS, k=words))}.\n" for i in range(count)]


def write_txt(directory: Path, documents: list[str]) -> Path:
    """One .txt file for each document."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(documents):
        (directory / f"{i:05d}.txt").write_text(text, encoding="utf-8")
    return directory


def config(path: Path, directory: Path, **changes: object) -> DataConfig:
    """A dataset of the text at `path`, with a tokenizer of 300 tokens, made by one process."""
    data = DataConfig(name="text", source="files", path=str(path), dir=str(directory))
    data.tokenizer_vocab_size, data.prepare_workers = 300, 1
    for key, value in changes.items():
        assert hasattr(data, key)
        setattr(data, key, value)
    return data


def die(*_: object) -> None:
    """In place of a function that a process of `prepare` calls. Here, because that process imports this module."""
    os._exit(1)
