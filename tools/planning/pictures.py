"""The pipeline of a plan as a picture (SVG) and as a trace for chrome://tracing and Perfetto (JSON)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from xml.etree import ElementTree

from parallel.planner.orders import smallest_micro_batches
from parallel.planner.schedule import Event, simulate
from parallel.planner.search import Plan

COLOURS = {"F": "#4e79a7", "B": "#59a14f", "I": "#8cd17d", "W": "#f1ce63", "FB": "#b07aa1"}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "FB": "forward and backward at once",
}
ROW, WIDTH, LEFT, LONGEST = 18, 1400, 70, 3  # pixels; rounds of micro-batches that are drawn


def events(plan: Plan) -> tuple[Event, ...]:
    """The passes of a step with as many micro-batches as a picture can show."""
    layout, step = plan.job.layout, plan.step
    group = layout.pp * (2 if plan.schedule.startswith("dual") else 1)
    shown = max(smallest_micro_batches(plan.schedule, layout.pp), LONGEST * group)
    number = min(plan.job.micro_batches, shown)
    return simulate(plan.schedule, layout.pp, layout.vpp, number, step.stages).events


def svg(shown: Sequence[Event], ranks: int) -> str:
    """A Gantt chart: a row for each pipeline rank, a box for each pass, with its micro-batch where it fits."""
    end = max(event.end for event in shown)
    scale = (WIDTH - LEFT - 10) / end
    height = ROW * ranks + 60
    root = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=str(WIDTH), height=str(height), viewBox=f"0 0 {WIDTH} {height}"
    )
    ElementTree.SubElement(root, "style").text = "text{font:10px sans-serif}"
    for rank in range(ranks):
        label = ElementTree.SubElement(root, "text", x="4", y=str(ROW * rank + 13))
        label.text = f"rank {rank}"
    for event in shown:
        x, width = LEFT + event.start * scale, (event.end - event.start) * scale
        y = ROW * event.rank
        box = ElementTree.SubElement(
            root, "rect", x=f"{x:.2f}", y=str(y + 1), width=f"{max(width - 0.4, 0.2):.2f}", height=str(ROW - 2),
            fill=COLOURS[event.item.kind],
        )  # fmt: skip
        ElementTree.SubElement(box, "title").text = describe(event)
        if width > 14:
            number = ElementTree.SubElement(root, "text", x=f"{x + 2:.2f}", y=str(y + 13))
            number.text = str(event.item.micro_batch)
    for place, (kind, name) in enumerate(NAMES.items()):
        x = LEFT + 210 * place
        ElementTree.SubElement(
            root, "rect", x=str(x), y=str(ROW * ranks + 14), width="12", height="12", fill=COLOURS[kind]
        )
        ElementTree.SubElement(root, "text", x=str(x + 18), y=str(ROW * ranks + 24)).text = name
    scale_text = ElementTree.SubElement(root, "text", x=str(LEFT), y=str(ROW * ranks + 50))
    scale_text.text = f"0 to {end:.3f} s"
    return ElementTree.tostring(root, encoding="unicode")


def describe(event: Event) -> str:
    """One pass in words."""
    item = event.item
    other = f", backward of micro-batch {item.back_micro_batch} on stage {item.back_stage}" if item.kind == "FB" else ""
    what = "forward" if item.kind == "FB" else NAMES[item.kind]
    milliseconds = 1e3 * (event.end - event.start)
    return f"{what} of micro-batch {item.micro_batch} on stage {item.stage}{other}: {milliseconds:.1f} ms"


def trace(shown: Sequence[Event]) -> str:
    """The same for chrome://tracing and Perfetto: times in microseconds, a thread for each rank."""
    rows = [
        {
            "name": f"{event.item.kind} {event.item.micro_batch}", "cat": event.item.kind, "ph": "X", "pid": 0,
            "tid": event.rank, "ts": round(event.start * 1e6, 3), "dur": round((event.end - event.start) * 1e6, 3),
            "args": {"what": describe(event)},
        }
        for event in shown
    ]  # fmt: skip
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in sorted({event.rank for event in shown})
    ]
    return json.dumps({"traceEvents": [*names, *rows], "displayTimeUnit": "ms"})
