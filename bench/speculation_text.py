"""Text of which a small model soon predicts most tokens, and not all."""

from __future__ import annotations

import random
from collections.abc import Iterator

_NAMES = ("Ada", "Alan", "Barbara", "Dennis", "Edsger", "Grace", "John", "Ken", "Margaret", "Niklaus")
_THINGS = ("apples", "books", "cards", "coins", "cups", "keys", "letters", "pencils", "plates", "stones")


def sentences(count: int, seed: int) -> Iterator[str]:
    """So many sentences, the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(count):
        giver, taker = draw.sample(_NAMES, 2)
        things, owned = draw.choice(_THINGS), draw.randint(10, 99)
        given = draw.randint(1, 9)
        yield (
            f"{giver} has {owned} {things}. {giver} gives {given} of the {things} to {taker}. "
            f"Now {giver} has {owned - given} {things} and {taker} has {given} {things} from {giver}.\n"
        )
