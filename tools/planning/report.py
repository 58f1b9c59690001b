"""The answer of `moe-plan` as one HTML page and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from parallel.planner.estimate import Estimate
from tools import kv_cache
from tools.planning import experiment, show
from tools.planning.answer import Answer

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 0 auto; padding: 1.5em max(1.2em, 4vw) 3em; max-width: 1420px; color: #222 }
.table, .picture, pre { overflow-x: auto } p, li, caption { overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1em 0 } caption { text-align: left; font-weight: bold; padding: .3em 0 }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: right }
td:first-child, th:first-child { text-align: left }
pre { background: #f5f5f5; padding: 1em }
@media (max-width: 640px) { body { font-size: 12px } h1 { font-size: 1.5em } td, th { padding: .2em .35em } }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in headline %}<p>{{ line }}</p>{% endfor %}
{% for table in tables %}<div class="table"><table><caption>{{ table.title }}</caption>
<tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<h2>Why other layouts do not fit</h2><ul>{% for text in refusals %}<li>{{ text }}</li>{% endfor %}</ul>
<h2>The pipeline, first micro-batches</h2><div class="picture">{{ picture | safe }}</div>
<h2>conf/experiment file</h2><pre>{{ yaml }}</pre>
</body></html>
"""


def html(result: Answer, picture: str) -> str:
    """One page that needs no other file."""
    from jinja2 import Environment

    cache = show.kv_cache_table(result)
    cache.title = kv_cache.headline(result.kv_cache)
    comparison = [show.compared(result, result.asked)] if result.asked else []
    tables = [show.plans(result), *comparison, show.where(result, result.best), show.memory(result, result.best.memory),
              cache, show.groups(result)]  # fmt: skip
    if result.costs:
        tables += [show.costs(result), show.changes(result)]
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(
        title=f"Plan: {result.cfg.model.name} on {result.used:,} x {result.hardware.gpu}",
        headline=[*show.headline(result).splitlines(), *([show.why(result, result.asked)] if result.asked else [])],
        tables=[_plain(table) for table in tables],
        refusals=show.refusals(result), picture=picture[picture.index("<svg") :],
        yaml=experiment.as_yaml(result.cfg, result.best),
    )  # fmt: skip


def _plain(table: Table) -> dict[str, Any]:
    columns: Sequence[Any] = table.columns
    cells = [[str(cell) for cell in column.cells] for column in columns]
    return {
        "title": str(table.title), "columns": [str(column.header) for column in columns],
        "rows": list(zip(*cells, strict=True)),
    }  # fmt: skip


def as_json(result: Answer) -> str:
    """Every figure."""
    report = {
        "model": result.cfg.model.name,
        "cluster": result.hardware.name,
        "gpus": result.gpus,
        "gpus_used": result.used,
        "layouts_tried": result.found.tried,
        "reasons": dict(result.found.reasons),
        "plans": [_plan(result, plan) for plan in result.found.plans],
        "asked": _plan(result, result.asked) if result.asked else None,
        "goodput": dataclasses.asdict(result.goodput),
        "costs": [dataclasses.asdict(bill) for bill in result.costs],
        "total": dataclasses.asdict(result.total()),
        "sensitivity": [
            dict(zip(("change", "goodput", "days", "dollars"), row, strict=True)) for row in result.sensitivity
        ],
        "kv_cache": kv_cache.as_json(result.kv_cache),
        "groups": [dataclasses.asdict(placement) for placement in result.placements],
    }
    return json.dumps(report, indent=1) + "\n"


def _plan(result: Answer, plan: Estimate) -> dict[str, Any]:
    workload, step = plan.workload, plan.step
    causal, whole = result.mfu(plan)
    return {
        **{name: getattr(workload.layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")},
        "micro_batch_size": workload.micro_batch_size,
        "micro_batches": workload.micro_batches,
        "schedule": plan.schedule,
        "dispatcher": plan.software.dispatcher,
        "fp8": workload.fp8,
        "recompute": workload.recompute,
        "recompute_modules": sorted(workload.recompute_modules),
        "recompute_stages": workload.recomputes.split("|") if workload.recompute_of_chunks else [],
        "step_s": step.seconds,
        "tokens_per_s_per_gpu": step.tokens_per_s_per_gpu,
        "mfu_causal": causal,
        "mfu_not_causal": whole,
        "bubble_fraction": step.pipeline.bubble_fraction,
        "components_s": step.components,
        "parts_s": step.parts,
        "memory_bytes": plan.memory_bytes,
        "memory_bytes_by_stage": plan.memory_of_ranks,
    }
