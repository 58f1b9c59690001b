"""The order of layouts: predicted against published, and how much of it the noise of what is published leaves."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log, sqrt
from statistics import NormalDist, median
from typing import Any

from tools.published.split import newest

FEWEST_LAYOUTS = 3
GOOD = 0.9
DRAWS = 2000


@dataclass(frozen=True)
class RankedRuns:
    """Layouts of one model on one hardware: tokens/s/GPU as published and as predicted."""

    model: str
    hardware: str
    published: list[float]
    predicted: list[float]

    @property
    def correlation(self) -> float:
        """Spearman's."""
        return spearman(self.published, self.predicted)


def groups(rows: Sequence[dict[str, Any]]) -> list[RankedRuns]:
    """Every (model, hardware) of enough layouts. Of one that was published for several releases the newest counts."""
    by_model: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_model[row["architecture"], row["cluster"]][row["configuration"]].append(row)
    result = []
    for (model, hardware), layouts in sorted(by_model.items()):
        if len(layouts) < FEWEST_LAYOUTS:
            continue
        counted = [newest(own, lambda row: int(row["month"])) for own in layouts.values()]
        published, predicted = (
            [median(row[f"{kind}_tokens_per_s_per_gpu"] for row in own) for own in counted]
            for kind in ("published", "predicted")
        )
        result.append(RankedRuns(model, hardware, published, predicted))
    return result


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank. 0 where either is constant."""
    a, b = ranks(first), ranks(second)
    middle = (len(a) - 1) / 2
    product = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    size = (sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)) ** 0.5
    return product / size if size else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Places in ascending order, from 0."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def repeats(rows: Sequence[dict[str, Any]]) -> list[float]:
    """How far two patch releases of one month are apart with the same configuration: logarithms of their ratio."""
    by_configuration: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["release"]:
            by_configuration[row["configuration"], row["month"]][row["release"]] = row["published_tokens_per_s_per_gpu"]
    return [
        abs(log(first / second)) for own in by_configuration.values() for first, second in combinations(own.values(), 2)
    ]


def reached_by_noise(groups: Sequence[RankedRuns], apart: Sequence[float]) -> tuple[list[float], float]:
    """What a model without any error would reach: (chance of each group to be in order, chance of all), if published
    figures scatter normally as `repeats` do. The middle of the repeats sets the scatter, so that outliers do not.
    """
    scatter = median(apart) / (sqrt(2) * NormalDist().inv_cdf(0.75))
    noise = random.Random(0)
    good, all_good = [0] * len(groups), 0
    for _ in range(DRAWS):
        seen = [[value * exp(noise.gauss(0, scatter)) for value in group.published] for group in groups]
        is_good = [spearman(g.published, s) >= GOOD for g, s in zip(groups, seen, strict=True)]
        good = [count + good_once for count, good_once in zip(good, is_good, strict=True)]
        all_good += all(is_good)
    return [count / DRAWS for count in good], all_good / DRAWS
