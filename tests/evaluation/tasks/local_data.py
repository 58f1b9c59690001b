"""Questions of the local tasks: text of the corpus that the tests train on, with words taken out."""

from __future__ import annotations

from typing import Any

import datasets

from tests.conftest import fixed_text

QUESTIONS = 12


def passages(**_: Any) -> dict[str, Any]:
    """Passages of 40 words, the words that follow, and words that do not."""
    words = next(fixed_text()).split(" ")
    documents = []
    for number in range(QUESTIONS):
        first = 60 * number
        passage, answer = words[first : first + 40], " ".join(words[first + 40 : first + 42])
        others = [" ".join(words[first + 45 + 2 * i : first + 47 + 2 * i]) for i in range(2)]
        label = number % 3
        choices = [*others[:label], answer, *others[label:]]
        documents.append({"text": " ".join(passage), "answer": answer, "choices": choices, "label": label})
    return {"test": datasets.Dataset.from_list(documents)}
