"""Writes the tables of docs/metrics.md from the registry of metrics: `python -m tools.metrics_reference`."""

from __future__ import annotations

from pathlib import Path

from moe_train.telemetry.registry import EVENTS, METRICS, Line, Metric, Place

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
START = "<!-- tables, written by python -m tools.metrics_reference -->\n"
END = "<!-- end of the tables -->\n"


def tables() -> str:
    """A Markdown table for each kind of line in metrics.jsonl, and for what is in TensorBoard only."""
    in_file = [row for row in METRICS if Place.METRICS_FILE in row.places]
    others = [row for row in METRICS if row not in in_file]
    parts = [_section(f"{_sentence(line.value)} of metrics.jsonl", _of(in_file, line)) for line in Line]
    parts += [_section("Not in metrics.jsonl", others), _events()]
    return "\n".join(parts)


def page() -> str:
    """The whole page, with its tables generated again."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + "\n" + tables() + "\n" + END + rest.partition(END)[2]


def _of(rows: list[Metric], line: Line) -> list[Metric]:
    return [row for row in rows if row.line is line]


def _section(title: str, rows: list[Metric]) -> str:
    header = "| metric | unit | over ranks | meaning | also in |\n|---|---|---|---|---|\n"
    return f"### {title}\n\n{header}" + "".join(map(_row, rows))


def _row(row: Metric) -> str:
    places = [place.value for place in Place if place in row.places and place is not Place.METRICS_FILE]
    reduction = row.reduction.value if row.reduction else ""
    name = row.name.replace("{}", "N").replace("{name}", "NAME")
    meaning = row.doc + (f". Condition: {row.when}" if row.when else "")
    return f"| `{name}` | {row.unit} | {reduction} | {meaning} | {', '.join(places)} |\n"


def _events() -> str:
    header = "| event | fields | meaning |\n|---|---|---|\n"
    rows = (f"| `{row.name}` | {', '.join(f'`{name}`' for name in row.fields)} | {row.doc} |\n" for row in EVENTS)
    return f"### Events\n\n{header}" + "".join(rows)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
