"""The pipeline of a plan as a picture (SVG) and as a trace for chrome://tracing and Perfetto (JSON)."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

from parallel.planner.estimate import Estimate
from parallel.planner.schedules import smallest_micro_batches
from parallel.planner.simulation import PassEvent, simulate

COLOURS = {"F": "#4e79a7", "B": "#59a14f", "I": "#8cd17d", "W": "#f1ce63", "FB": "#b07aa1"}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "FB": "forward and backward at once",
}
ROW, WIDTH = 0.25, 19.0  # inches
NARROWEST = 0.01  # of the width: a box that a number fits in
LONGEST = 3  # rounds of micro-batches that are drawn


def events(plan: Estimate) -> tuple[PassEvent, ...]:
    """The passes of a step with as many micro-batches as a picture can show."""
    layout, step = plan.workload.layout, plan.step
    group = layout.pp * (2 if plan.schedule.startswith("dual") else 1)
    shown = max(smallest_micro_batches(plan.schedule, layout.pp), LONGEST * group)
    number = min(plan.workload.micro_batches, shown)
    return simulate(plan.schedule, layout.pp, layout.vpp, number, step.stages).events


def svg(shown: Sequence[PassEvent], ranks: int) -> str:
    """A Gantt chart: a row for each pipeline rank, a box for each pass, with its micro-batch where it fits."""
    import matplotlib
    from matplotlib.figure import Figure

    end = max(event.end for event in shown)
    # Text stays text, and the same plan makes the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 7}):
        figure = Figure(figsize=(WIDTH, ROW * ranks + 0.9), layout="constrained")
        axes = figure.subplots()
        for kind, name in NAMES.items():
            boxes = [event for event in shown if event.item.kind == kind]
            lengths = [event.end - event.start for event in boxes]
            axes.barh(
                [event.rank for event in boxes], lengths, left=[event.start for event in boxes], height=0.9,
                color=COLOURS[kind], edgecolor="white", linewidth=0.2, label=name if boxes else None,
            )  # fmt: skip
        for event in shown:
            if event.end - event.start > NARROWEST * end:
                middle = (event.start + event.end) / 2
                axes.text(middle, event.rank, str(event.item.micro_batch), ha="center", va="center", clip_on=True)
        axes.set(xlim=(0, end), ylim=(ranks - 0.4, -0.6), xlabel="s", ylabel="pipeline rank", yticks=range(ranks))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1), ncols=len(NAMES), borderaxespad=-2, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def describe(event: PassEvent) -> str:
    """One pass in words."""
    item = event.item
    other = f", backward of micro-batch {item.back_micro_batch} on stage {item.back_stage}" if item.kind == "FB" else ""
    name = "forward" if item.kind == "FB" else NAMES[item.kind]
    milliseconds = 1e3 * (event.end - event.start)
    return f"{name} of micro-batch {item.micro_batch} on stage {item.stage}{other}: {milliseconds:.1f} ms"


def trace(shown: Sequence[PassEvent]) -> str:
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
