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


def planted(count: int, seed: int) -> tuple[list[str], set[int]]:
    """Texts of which some are near-duplicates of earlier ones, in random order, and which these are.

    Two texts of a group differ in at most 6 of 400 words, so that their sequences of 24 characters have a Jaccard
    similarity of about 0.87 or more. Texts of different groups share hardly any.
    """
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    texts: list[tuple[int, str]] = []
    for group in range(count):
        original = draw.choices(words, k=400)
        texts.append((group, " ".join(original)))
        for _ in range(draw.choice((0, 1, 1, 3))):
            changed = list(original)
            for place in draw.sample(range(400), draw.randint(1, 3)):
                changed[place] = draw.choice(words)
            texts.append((group, " ".join(changed)))
    draw.shuffle(texts)
    groups = [group for group, _ in texts]
    return [text for _, text in texts], {i for i, group in enumerate(groups) if group in groups[:i]}
