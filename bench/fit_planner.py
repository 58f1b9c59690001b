"""Fits the constants of the time model on the fitting part of published runs: `python -m bench.fit_planner [FILE.csv]`.

An evolution strategy in the logarithm of each constant, on the mean absolute logarithmic error, where each
configuration counts once however often it was published, and on the order of layouts. It starts from the present
constants, and prints those for parallel/planner/calibration.py.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from math import exp, log
from pathlib import Path
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray

from moe_train.model.memory import weights_of
from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.memory import Weights
from parallel.planner.step_time import StepTime
from parallel.planner.workload import Workload
from tools.published.predict import predict, published_tokens_per_s, timed
from tools.published.rows import Row
from tools.published.split import is_test, newest
from tools.published.table import TABLE
from tools.published.validation import read

# Name -> smallest and largest value that the fit may take. `gemm_speed` may exceed 1: see `Calibration`.
BOUNDS = {
    "gemm_half_k": (30, 1000), "gemm_speed": (0.6, 1.4), "weights_speed": (0.5, 1),
    "block_speed": (0.75, 1), "power_exponent": (0.2, 1), "quantize_passes": (0.3, 2), "memory_passes": (0.5, 3.5),
    "small_kernel_us": (1, 3), "attention_speed": (0.7, 1.2), "scores_passes": (0.1, 2),
    **{f"expert_passes_{era}": (0.3, 3) for era in (2023, 2025, 2026)},
    "tp_exposed": (0.05, 1),
    "dp_exposed": (0.02, 1), "fsdp_exposed": (0.02, 1), "all_to_all_exposed": (0.02, 0.5), "pp_exposed": (0.02, 1),
    "pass_us": (1, 3000), "host_us": (1.5, 60), "sync_us": (10, 3000), "flex_sync_us": (10, 3000), "sync_blend": (1, 4),
    "capacity_us": (20, 3000),
    "real_imbalance": (1.0, 2.0), "graph_kernels": (0.05, 1.0), "grouped_kernel": (0.02, 1.0), "overlap_host": (1, 3),
    "step_s": (0.03, 0.3), "straggler": (0.0005, 0.03),
}  # fmt: skip
# Where a step of DeepSeek-V3 goes, seconds (arXiv 2505.09343, table 4); its row must be in the fitting part. What its
# context extension took, GPU-hours, and its stages (arXiv 2412.19437, table 1 and section 4.3; cp is not published, and
# leaves a rank's tokens unchanged): the only long sequences whose time is known.
COMPONENTS = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}
EXTENSION_HOURS, EXTENSION_STEPS = 119_000, 1000
EXTENSION = ((32768, 1920, 8), (131072, 480, 32))  # sequence, batch, cp
ORDER_WEIGHT, MARGIN = 4.0, 0.02
SPREAD = 0.08  # of the first steps, in natural logarithms


@dataclass(frozen=True)
class FitCase:
    """A published run with what does not depend on the constants."""

    row: Row
    workload: Workload
    weights: list[Weights]
    published: float
    share: float


def cases(path: Path, constants: Calibration, test: bool = False) -> list[FitCase]:
    """The rows of the fitting part (or of the test part) that count, with the workload chosen under `constants`."""
    fit_cases = []
    for _, row in read(path):
        if isinstance(row, str) or row.run.left_out or is_test(row) != test:
            continue
        published = published_tokens_per_s(row)
        if published is None:
            continue
        workload = predict(row, constants, simulated=False).workload
        fit_cases.append(FitCase(row, workload, weights_of(row.model, workload), published, 1.0))
    counts = Counter(case.row.configuration for case in fit_cases)
    return [replace(case, share=1 / counts[case.row.configuration]) for case in fit_cases]


def step(case: FitCase, constants: Calibration, simulated: bool) -> StepTime:
    """The predicted step of a case."""
    return timed(case.row, case.workload, case.weights, constants, simulated)


def error(case: FitCase, constants: Calibration) -> float:
    """Logarithm of predicted over published throughput."""
    return log(step(case, constants, simulated=False).tokens_per_s_per_gpu / case.published)


def objective(fit_cases: list[FitCase], constants: Calibration) -> float:
    """Weighted mean of the absolute errors, each counted up to 60 %, so that outliers do not decide; and layouts in the
    wrong order.

    The one step that is published by parts adds what it is off by more than 1.5 %, its parts by more than 10 %, and its
    context extension by more than 3 %.
    """
    total = sum(case.share for case in fit_cases)
    errors = [error(case, constants) for case in fit_cases]
    score = sum(case.share * min(0.6, abs(off)) for case, off in zip(fit_cases, errors, strict=True)) / total
    score += ORDER_WEIGHT * disorder(fit_cases, errors)
    by_parts = [case for case in fit_cases if case.row.schedule == "dualpipe"][:1]
    for case in by_parts:
        timed_step = step(case, constants, simulated=True)
        score += 0.5 * sum(
            max(0.0, abs(log(timed_step.components[name] / value)) - 0.1) for name, value in COMPONENTS.items()
        )
        score += 0.5 * max(0.0, abs(log(timed_step.tokens_per_s_per_gpu / case.published)) - 0.015)
        score += 0.5 * max(0.0, abs(log(extension_hours(case, constants) / EXTENSION_HOURS)) - 0.03)
    return score


def extension_hours(case: FitCase, constants: Calibration) -> float:
    """GPU-hours of DeepSeek-V3's context extension, with the step of its pre-training as `case`."""
    seconds, layout = 0.0, case.workload.layout
    for length, batch, cp in EXTENSION:
        longer = replace(layout, cp=cp, dp=layout.dp // cp)
        workload = replace(case.workload, layout=longer, seq_length=length, micro_batches=batch // longer.dp)
        seconds += EXTENSION_STEPS * timed(case.row, workload, case.weights, constants).seconds
    return seconds / 3600 * layout.world_size


def disorder(fit_cases: list[FitCase], errors: list[float]) -> float:
    """How far pairs of layouts of a (model, hardware) are from the published order, a mean over groups.

    A pair counts by the logarithm that its predicted ratio lacks to the published order, with a small margin. Of a
    layout the newest release counts.
    """
    groups: dict[tuple[str, str], dict[str, list[tuple[int, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for case, off in zip(fit_cases, errors, strict=True):
        point = case.row.month, log(case.published), log(case.published) + off
        groups[case.row.model.name, case.row.hardware.name][case.row.configuration].append(point)
    lacking = []
    for layouts in groups.values():
        counted = [newest(points_of_layout, lambda point: point[0]) for points_of_layout in layouts.values()]
        points = [
            (median(known for _, known, _ in release), median(made for *_, made in release)) for release in counted
        ]
        pairs = [
            max(0.0, min(MARGIN, known - other) - (made - other_made))
            for known, made in points for other, other_made in points if known > other
        ]  # fmt: skip
        if pairs:
            lacking.append(mean(pairs))
    return mean(lacking)


def at(point: NDArray[np.float64]) -> Calibration:
    """The constants of a vector of logarithms, within their bounds. What is fused once stays fused."""
    values = dict(zip(BOUNDS, np.exp(np.clip(point, *limits())).tolist(), strict=True))
    values["expert_passes_2026"] = min(values["expert_passes_2026"], values["expert_passes_2025"])
    return replace(FITTED, **values)


def limits() -> NDArray[np.float64]:
    """Logarithms of the smallest and largest values, [2, constants]."""
    return np.asarray(np.log(list(BOUNDS.values())).T, dtype=np.float64)


def fit(fit_cases: list[FitCase], rounds: int, seed: int = 1) -> Calibration:
    """The constants with the least objective that a separable CMA-ES finds from the present ones.

    R. Ros and N. Hansen, A simple modification in CMA-ES achieving linear time and space complexity, PPSN 2008.
    """
    low, high = limits()

    def cost(point: NDArray[np.float64]) -> float:
        outside = float(np.sum((point - np.clip(point, low, high)) ** 2))
        return objective(fit_cases, at(point)) + 0.05 * outside

    centre, size = np.clip(np.log([getattr(FITTED, name) for name in BOUNDS]), low, high), SPREAD
    n = len(centre)
    population = 4 + int(3 * log(n))
    parents = population // 2
    weights = log(parents + 0.5) - np.log(np.arange(1, parents + 1))
    weights /= weights.sum()
    effective = 1 / float(np.sum(weights**2))
    fade, size_fade = (4 + effective / n) / (n + 4 + 2 * effective / n), (effective + 2) / (n + effective + 5)
    rank_one = 2 / ((n + 1.3) ** 2 + effective) * (n + 2) / 3
    rank_mu = min(1 - rank_one, 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective) * (n + 2) / 3)
    damping = 1 + 2 * max(0.0, ((effective - 1) / (n + 1)) ** 0.5 - 1) + size_fade
    expected = n**0.5 * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    variance = np.minimum(1.0, (high - low) / 2) ** 2
    path, size_path = np.zeros(n), np.zeros(n)
    random = np.random.default_rng(seed)
    best, least = centre, cost(centre)
    for number in range(rounds):
        steps = random.standard_normal((population, n))
        points = centre + size * steps * np.sqrt(variance)
        costs = [cost(point) for point in points]
        order = np.argsort(costs)
        if costs[order[0]] < least:
            best, least = points[order[0]], costs[order[0]]
        chosen = steps[order[:parents]]
        mean_step = weights @ chosen
        centre = centre + size * np.sqrt(variance) * mean_step
        size_path = (1 - size_fade) * size_path + (size_fade * (2 - size_fade) * effective) ** 0.5 * mean_step
        length = float(np.linalg.norm(size_path))
        moving = length / (1 - (1 - size_fade) ** (2 * number + 2)) ** 0.5 < (1.4 + 2 / (n + 1)) * expected
        path = (1 - fade) * path + moving * (fade * (2 - fade) * effective) ** 0.5 * np.sqrt(variance) * mean_step
        variance = (1 - rank_one - rank_mu) * variance + rank_one * path**2 + rank_mu * variance * (weights @ chosen**2)
        size *= exp(size_fade / damping * (length / expected - 1))
        if number % 10 == 9:
            print(f"generation {number + 1}: {least:.4f} (step {size:.3f})", flush=True)
    return at(best)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", default=TABLE, help="published runs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=300, help="generations")
    parser.add_argument("--seed", type=int, default=1, help="of the random steps")
    arguments = parser.parse_args()
    fitted_cases = cases(arguments.table, FITTED)
    constants = fit(fitted_cases, arguments.rounds, arguments.seed)
    for name, part in (("fit", fitted_cases), ("test", cases(arguments.table, constants, test=True))):
        errors = [abs(exp(error(case, constants)) - 1) for case in part]
        print(f"{name}: {len(part)} rows, median {median(errors):.1%}")
    for field in fields(constants):
        print(f"    {field.name}: float = {getattr(constants, field.name):.4g}")


if __name__ == "__main__":
    main()
