"""Questions of the local tasks: made-up text, the words that follow it, and words that do not."""

from __future__ import annotations

import random
from typing import Any

import datasets

QUESTIONS = 12
WORDS = 40
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def passages(**_: Any) -> dict[str, Any]:
    """A text of 40 words, its next two words, and three choices of which these are one."""
    draw = random.Random(1)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(count))

    documents = []
    for number in range(QUESTIONS):
        text, choices, label = words(WORDS), [words(2) for _ in range(3)], number % 3
        documents.append({"text": text, "answer": choices[label], "choices": choices, "label": label})
    return {"test": datasets.Dataset.from_list(documents)}
