"""Fits the constants of the time model on the fitting part of published runs: `python -m bench.fit_planner FILE.csv`.

Coordinate descent in the logarithm of each constant, on the mean absolute logarithmic error, where each configuration
counts once however often it was published. It prints the constants for parallel/planner/calibration.py and
parallel/planner/software.py.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import mean, median

from parallel.planner import software
from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.job import Job
from parallel.planner.memory import Weights
from parallel.planner.time import StepTime
from tools.planning.predict import predict, published_tokens_per_s, timed, weights_of
from tools.planning.rows import Row, understand
from tools.planning.split import is_test

# Name -> smallest and largest value that is still physical.
BOUNDS = {
    "gemm_half_k": (30, 1000), "gemm_speed": (0.6, 1.1), "weights_speed": (0.5, 1),
    "block_speed": (0.75, 1), "flash2_speed": (0.35, 1), "quantize_passes": (0.3, 2), "memory_passes": (0.7, 3.5),
    "attention_speed": (0.5, 1),
    "attention_half": (50, 1000), "attention_backward": (2.5, 3.5), "tp_exposed": (0.05, 1), "cp_exposed": (0.05, 1),
    "dp_exposed": (0.02, 1), "fsdp_exposed": (0.02, 1), "all_to_all_exposed": (0.02, 0.5), "pp_exposed": (0.02, 1),
    "host_us": (1.5, 25), "sync_us": (10, 3000), "flex_sync_us": (10, 3000), "sync_blend": (1, 4),
    "real_imbalance": (1.0, 1.6), "graph_kernels": (0.05, 1.0), "grouped_kernel": (0.02, 1.0), "overlap_host": (1, 3),
    "step_s": (0.03, 0.3), "straggler": (0.0005, 0.03),
}  # fmt: skip
# Where a step of DeepSeek-V3 goes, seconds (arXiv 2505.09343, table 4); its row must be in the fitting part.
COMPONENTS = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}
ORDER_WEIGHT, MARGIN = 1.0, 0.02
GENERATION_BOUNDS = {"fusion": (0.4, 2.5), "kernels": (0.05, 3)}


@dataclass(frozen=True)
class Case:
    """A published run with what does not depend on the constants."""

    row: Row
    job: Job
    weights: list[Weights]
    published: float
    share: float


def cases(path: Path, constants: Calibration, test: bool = False) -> list[Case]:
    """The rows of the fitting part (or of the test part) that count, with the job chosen under `constants`."""
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for index, values in enumerate(csv.DictReader(file)):
            row = understand(index, values, constants)
            if isinstance(row, str) or row.left_out or is_test(row) != test:
                continue
            published = published_tokens_per_s(row)
            if published is None:
                continue
            job = predict(row, constants, simulated=False).job
            found.append(Case(row, job, weights_of(row.model, job), published, 1.0))
    counts = Counter(case.row.configuration for case in found)
    return [replace(case, share=1 / counts[case.row.configuration]) for case in found]


def step(case: Case, constants: Calibration, generations: dict[int, software.Software], simulated: bool) -> StepTime:
    """The predicted step of a case."""
    saved, software.GENERATIONS = software.GENERATIONS, generations
    try:
        row = understand(case.row.index, case.row.values, constants)
    finally:
        software.GENERATIONS = saved
    if isinstance(row, str):
        raise ValueError(row)
    return timed(row, case.job, case.weights, constants, simulated)


def error(case: Case, constants: Calibration, generations: dict[int, software.Software]) -> float:
    """Logarithm of predicted over published throughput."""
    return log(step(case, constants, generations, simulated=False).tokens_per_s_per_gpu / case.published)


def objective(found: list[Case], constants: Calibration, generations: dict[int, software.Software]) -> float:
    """Weighted mean of the absolute errors, each counted up to 60 %, so that outliers do not decide; and layouts in the
    wrong order.

    The one step that is published by parts adds what it is off by more than 1.5 %, and its parts by more than 10 %.
    """
    total = sum(case.share for case in found)
    errors = [error(case, constants, generations) for case in found]
    score = sum(case.share * min(0.6, abs(one)) for case, one in zip(found, errors, strict=True)) / total
    score += ORDER_WEIGHT * disorder(found, errors)
    by_parts = [case for case in found if case.row.schedule == "dualpipe"][:1]
    for case in by_parts:
        one = step(case, constants, generations, simulated=True)
        score += 0.15 * sum(
            max(0.0, abs(log(one.components[name] / value)) - 0.1) for name, value in COMPONENTS.items()
        )
        score += 0.5 * max(0.0, abs(log(one.tokens_per_s_per_gpu / case.published)) - 0.015)
    return score


def disorder(found: list[Case], errors: list[float]) -> float:
    """How far pairs of layouts of a (model, hardware) are from the published order, a mean over groups.

    A pair counts by the logarithm that its predicted ratio lacks to the published order, with a small margin.
    """
    groups: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for case, one in zip(found, errors, strict=True):
        known = log(case.published)
        groups[case.row.model.name, case.row.hardware.name][case.row.configuration].append((known, known + one))
    lacking = []
    for layouts in groups.values():
        points = [(median(known for known, _ in own), median(made for _, made in own)) for own in layouts.values()]
        pairs = [
            max(0.0, min(MARGIN, known - other) - (made - other_made))
            for known, made in points for other, other_made in points if known > other
        ]  # fmt: skip
        if pairs:
            lacking.append(mean(pairs))
    return mean(lacking)


def fit(found: list[Case], rounds: int) -> tuple[Calibration, dict[int, software.Software]]:
    """The constants and generations with the least objective that coordinate descent finds."""
    constants, generations = FITTED, dict(software.GENERATIONS)
    best, size = objective(found, constants, generations), 0.4
    for number in range(rounds):
        before = best
        for name, (low, high) in BOUNDS.items():
            for sign in (1, -1):
                value = min(high, max(low, getattr(constants, name) * exp(sign * size)))
                tried = replace(constants, **{name: value})
                score = objective(found, tried, generations)
                if score < best - 1e-6:
                    best, constants = score, tried
                    break
        for month in generations:
            for name, (low, high) in GENERATION_BOUNDS.items():
                for sign in (1, -1):
                    value = min(high, max(low, getattr(generations[month], name) * exp(sign * size)))
                    changed = {**generations, month: replace(generations[month], **{name: value})}
                    if not falls(name, changed):
                        continue
                    score = objective(found, constants, changed)
                    if score < best - 1e-6:
                        best, generations = score, changed
                        break
        print(f"round {number}: {best:.4f} (step {size:.3f})", flush=True)
        if before - best < 1e-3:
            size /= 2
        if size < 0.02:
            break
    return constants, generations


def falls(name: str, generations: dict[int, software.Software]) -> bool:
    """Whether a figure never rises from one generation to the next, from that on which first ran DeepEP."""
    values = [getattr(one, name) for month, one in generations.items() if month >= 202506]
    return all(later <= earlier for earlier, later in pairwise(values))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="published runs")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    found = cases(arguments.table, FITTED)
    constants, generations = fit(found, arguments.rounds)
    for name, part in (("fit", found), ("test", cases(arguments.table, constants, test=True))):
        errors = [abs(exp(error(case, constants, generations)) - 1) for case in part]
        print(f"{name}: {len(part)} rows, median {median(errors):.1%}")
    for field in fields(constants):
        print(f"    {field.name}: float = {getattr(constants, field.name):.4g}")
    for name in GENERATION_BOUNDS:
        values = ", ".join(f"{month}: {getattr(one, name):.3g}" for month, one in generations.items())
        print(f"{name.upper()} = {{{values}}}")


if __name__ == "__main__":
    main()
