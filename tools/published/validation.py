"""`moe-plan validate`: predictions against a table of published runs, row by row and in sum."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.table import Table

from parallel.errors import ConfigError
from parallel.planner.calibration import FITTED
from parallel.planner.estimate import megatron_schedule
from parallel.suggest import Impossible
from tools import terminal
from tools.published import free_text, ranking
from tools.published import table as published_table
from tools.published.predict import predict, published_tokens_per_s
from tools.published.rows import FILLED, Row, understand
from tools.published.split import is_test

_RESULTS = Path(__file__).parents[2] / "bench" / "results"
RESULTS = (_RESULTS if _RESULTS.is_dir() else Path()) / "plan_validate.json"
"""Kept with the code in a clone. An installed package has no such folder and writes to the current directory."""
# Columns of the table, in its own units.
SHOWN = ("source", "model", "hardware", "n_gpus", "precision", "seq_len", "gbs", "mbs", "tp", "pp", "vpp", "cp", "ep",
         "etp", "recompute")  # fmt: skip
WORST = 10


def read(path: Path, models: str | None = None) -> list[tuple[dict[str, str], Row | str]]:
    """The rows of a table: the text of each, and the parsed row or why there is no prediction.

    Raises:
        ConfigError: it is not a table with at least a model and its hardware.
    """
    columns, rows = published_table.read(path)
    normalise = None if published_table.MARK in columns else free_text.normalised
    return [(values, _understood(index, values, normalise, models)) for index, values in enumerate(rows)]


def _understood(
    index: int,
    values: dict[str, str],
    normalise: Callable[[Mapping[str, str], str | None], dict[str, str]] | None,
    models: str | None,
) -> Row | str:
    try:
        row = normalise(values, models) if normalise else values
        return understand(index, published_table.parse(row), models)
    except Impossible as error:
        return error.cause


def run(path: Path, models: str | None, results: Path | None) -> None:
    """Print every row and the summaries, and write them as JSON.

    Raises:
        ConfigError: the table or a model file cannot be read, or the result cannot be written.
    """
    if models is not None and not Path(models).is_dir():
        raise ConfigError(f"models={models} is not a directory", "name one with YAML files of models")
    given = read(path, models)
    if not given:
        raise ConfigError(f"runs={path} has no rows", "name a table of published runs")
    rows = [compare(index, values, row) for index, (values, row) in enumerate(given)]
    report = {**summary(rows), "rules": " ".join(FILLED.split()), "rows": rows}
    console = terminal.console()
    console.print(table(rows))
    for name in ("by_source", "by_hardware", "by_model"):
        console.print(grouped(name, report[name]))
    for line in [*unmodelled(rows), *lines(report)]:
        console.print(line, soft_wrap=True)
    target = results or RESULTS
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(as_json(report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}", "set results=FILE.json") from error
    console.print(f"wrote {target}", soft_wrap=True)


def as_json(found: dict[str, Any]) -> str:
    """The result, with one line for each row."""
    head = json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {rows}\n ]\n}}\n'


def compare(index: int, values: Mapping[str, str], row: Row | str) -> dict[str, Any]:
    """One row: what was published, what is predicted, and the relative errors; or why there is no prediction."""
    result: dict[str, Any] = {"row": index, **{name: values.get(name, "") for name in SHOWN}}
    if isinstance(row, str):
        return {**result, "not_modelled": row}
    try:
        return {**result, **_predicted(row)}
    except (ConfigError, ValueError, ArithmeticError) as error:
        cause = error.cause if isinstance(error, ConfigError) else error
        return {**result, "not_modelled": f"it cannot run so: {cause}"}


def _predicted(row: Row) -> dict[str, Any]:
    prediction, run = predict(row, FITTED), row.run
    step, layout = prediction.step, prediction.workload.layout
    figures = {
        "tokens_per_s_per_gpu": (published_tokens_per_s(row), step.tokens_per_s_per_gpu),
        "step_time_s": (run.step_time_s, step.seconds),
        "peak_mem_gb": (run.peak_mem_gb, prediction.memory_bytes / 1e9),
    }
    result: dict[str, Any] = {
        "architecture": row.model.name, "cluster": row.hardware.name, "configuration": row.configuration,
        "month": row.month, "release": run.release, "part": "test" if is_test(row) else "fit",
        "layout": " ".join(f"{field.name}{getattr(layout, field.name)}" for field in fields(layout)),
        "recompute_taken": prediction.recompute, "schedule": row.schedule or megatron_schedule(prediction.workload),
        "bubble_fraction": round(step.pipeline.bubble_fraction, 4),
    }  # fmt: skip
    if run.left_out:
        result["left_out"] = run.left_out
    if not prediction.fits:
        result["does_not_fit"] = True
    for name, (known, predicted) in figures.items():
        result[f"published_{name}"], result[f"predicted_{name}"] = known, predicted
        result[f"error_{name}"] = None if known is None else predicted / known - 1
    return result


def counts(row: dict[str, Any]) -> bool:
    """Whether a row counts towards the accuracy of throughput."""
    return "left_out" not in row and row.get("error_tokens_per_s_per_gpu") is not None


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the absolute errors by part, source, hardware and model; rank correlation of layouts."""
    counted = [row for row in rows if counts(row)]
    order = ranking.groups(counted)
    correlations = [group.correlation for group in order]
    apart = ranking.repeats(counted)
    chances, all_held = ranking.reached_by_noise(order, apart) if order and apart else ([None] * len(order), None)

    def median_of(name: str) -> float | None:
        sizes = [abs(row[name]) for row in rows if "left_out" not in row and row.get(name) is not None]
        return median(sizes) if sizes else None

    return {
        "rows_read": len(rows),
        "rows_counted": len(counted),
        "rows_not_modelled": sum("not_modelled" in row for row in rows),
        "rows_left_out": sum("left_out" in row for row in rows),
        "median_error_fit": _median(row for row in counted if row["part"] == "fit"),
        "median_error_test": _median(row for row in counted if row["part"] == "test"),
        "median_error": _median(counted),
        "rank_correlation_mean": mean(correlations) if order else None,
        "rank_correlation_median": median(correlations) if order else None,
        "rank_correlation_groups_at_least_0.9": sum(value >= ranking.GOOD for value in correlations),
        "rank_correlation_groups": [
            {
                "model": g.model,
                "hardware": g.hardware,
                "layouts": len(g.published),
                "correlation": g.correlation,
                "chance_without_error": chance,
            }
            for g, chance in zip(order, chances, strict=True)
        ],
        "repeats": len(apart),
        "repeats_median_difference": median(apart) if apart else None,
        "rank_correlation_groups_of_a_model_without_error": sum(c for c in chances if c is not None) if apart else None,
        "rank_correlation_chance_of_all": all_held,
        "median_error_memory": median_of("error_peak_mem_gb"),
        "median_error_step_time": median_of("error_step_time_s"),
        "by_source": _by(counted, lambda row: row["source"]),
        "by_hardware": _by(counted, lambda row: row["cluster"]),
        "by_model": _by(counted, lambda row: row["architecture"]),
        "worst": [row["row"] for row in sorted(counted, key=_size, reverse=True)[:WORST]],
    }


def _size(row: dict[str, Any]) -> float:
    return abs(row["error_tokens_per_s_per_gpu"])


def _median(rows: Iterable[dict[str, Any]]) -> float | None:
    sizes = [_size(row) for row in rows]
    return median(sizes) if sizes else None


def _by(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, Any]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {
        name: {
            "rows": len(own), "median_error": _median(own),
            "bias": median(r["error_tokens_per_s_per_gpu"] for r in own),
        }
        for name, own in sorted(groups.items())
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each row."""
    shown = Table(title="Published and predicted tokens/s/GPU")
    for column in (
        "row",
        "model",
        "hardware",
        "layout",
        "recompute",
        "published",
        "predicted",
        "error",
        "step time error",
        "memory error",
        "part",
    ):
        shown.add_column(column, overflow="fold")
    for row in rows:
        if "not_modelled" in row:
            shown.add_row(str(row["row"]), row["model"], row["hardware"], row["not_modelled"])
            continue
        known = row["published_tokens_per_s_per_gpu"]
        shown.add_row(
            str(row["row"]), row["architecture"], row["cluster"], row["layout"], row["recompute_taken"],
            "" if known is None else f"{known:,.1f}", f"{row['predicted_tokens_per_s_per_gpu']:,.1f}",
            _percent(row["error_tokens_per_s_per_gpu"]), _percent(row["error_step_time_s"]),
            _percent(row["error_peak_mem_gb"]),
            row["left_out"] if "left_out" in row else row["part"],
        )  # fmt: skip
    return shown


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def grouped(name: str, groups: dict[str, dict[str, Any]]) -> Table:
    """Medians of one grouping."""
    shown = Table(title=name.replace("_", " "))
    for column in (name.split("_")[1], "rows", "median absolute error", "median error"):
        shown.add_column(column, overflow="fold")
    for key, group in groups.items():
        shown.add_row(key, str(group["rows"]), f"{group['median_error']:.1%}", f"{group['bias']:+.1%}")
    return shown


def unmodelled(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why rows have no prediction, and which; the first row is 0."""
    reasons: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if "not_modelled" in row:
            reasons[row["not_modelled"]].append(row["row"])
    return [f"not modelled: rows {', '.join(map(str, numbers))}: {reason}" for reason, numbers in reasons.items()]


def lines(found: dict[str, Any]) -> list[str]:
    """The result in words."""

    def percent(name: str) -> str:
        return "none" if found[name] is None else f"{found[name]:.1%}"

    groups = found["rank_correlation_groups"]
    result = [
        (
            f"{found['rows_read']} rows: {found['rows_counted']} counted, {found['rows_left_out']} predicted but left "
            f"out, {found['rows_not_modelled']} not modelled"
        ),
        (
            f"median absolute error of tokens/s/GPU: {percent('median_error_fit')} fit, "
            f"{percent('median_error_test')} test, {percent('median_error')} all; of step "
            f"time: {percent('median_error_step_time')}; of memory: {percent('median_error_memory')}"
        ),
    ]
    if groups:
        result.append(
            f"rank correlation of layouts within (model, hardware): mean {found['rank_correlation_mean']:.2f}, median "
            f"{found['rank_correlation_median']:.2f} over {len(groups)} groups, "
            f"{found['rank_correlation_groups_at_least_0.9']} of them at least 0.9"
        )
    if groups and found["repeats"]:
        result.append(
            f"patch releases of one month differ by {percent('repeats_median_difference')} (median of "
            f"{found['repeats']} pairs): for a model without error that noise would leave "
            f"{found['rank_correlation_groups_of_a_model_without_error']:.1f} of the {len(groups)} groups at 0.9 on "
            f"average, and all of them with a chance of {percent('rank_correlation_chance_of_all')}"
        )
    result.append(f"worst rows: {', '.join(map(str, found['worst']))}")
    return result
