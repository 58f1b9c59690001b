"""Predicted memory of a rank against what a run on this machine really keeps, and against published peaks on GPUs.

`make bench-memory` trains one step of every model, layout and recomputation set below, as `moe-train` would, in bf16;
further steps in emulated FP8, with activations moved to a file, and with stages that recompute differently. What a
micro-batch keeps for its backward pass, logits included, must be predicted within 3 %, and what parameters, gradients
and the optimizer hold to the byte. Each figure is the mean over the ranks of a pipeline stage: routing gives some
expert-parallel ranks more tokens than others, but their total is fixed, and the prediction takes them to get equally
many. It writes bench/results/memory.json.

`--published FILE` compares with published peaks instead, from a table of runs with the columns of
bench/data/published_memory.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import published_memory
from bench.parity import COMMON
from bench.recompute_sets import SETS
from bench.results import write
from launch import job
from launch.local import forkserver, launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.loop.callbacks.profiler import PARTS
from moe_train.model.memory import predict, workload_of
from parallel.errors import ConfigError
from parallel.planner.memory import saved_per_micro_batch

TOLERANCE = 0.03

SMALL = ["data.tokenizer_vocab_size=512", "model.vocab_size=1024"]
MODELS: dict[str, list[str]] = {
    "tiny": [*SMALL, "train.seq_length=128"],
    "mid-size mla": [
        *SMALL, "train.seq_length=256", "model.num_layers=6", "model.hidden_size=512", "model.ffn_hidden_size=1408",
        "model.moe_ffn_hidden_size=256", "model.num_attention_heads=8", "model.q_lora_rank=192",
        "model.kv_lora_rank=128", "model.qk_nope_head_dim=64", "model.qk_rope_head_dim=32", "model.v_head_dim=64",
    ],
    "gqa": [
        *SMALL, "train.seq_length=256", "model.attention=gqa", "model.num_query_groups=2", "model.head_dim=64",
        "model.qk_norm=head", "model.rope_type=rope", "model.mtp_num_layers=0", "model.num_shared_experts=0",
        "model.router_score=softmax", "model.router_bias=false", "model.router_num_groups=0",
        "model.router_topk_groups=0", "model.balance_losses=[aux_loss]",
    ],
}  # fmt: skip
LAYOUTS: dict[str, list[str]] = {
    "tp1": [],
    "tp2 sp": ["parallel.tp=2"],
    "ep2": ["parallel.ep=2"],
    "pp2": ["parallel.pp=2"],
}
# In addition to the sets of recomputation, which bench.recompute takes too.
MORE: dict[str, list[str]] = {
    "full on the first stage": ["recompute.stages=[{mode:full},{mode:none}]"],
    "fp8_block": ["precision=fp8_block"],
    "fp8_block; layernorm,moe_act": [
        "precision=fp8_block", "recompute=selective", "recompute.modules=[layernorm,moe_act]",
    ],
    "fp8_block, dispatch too": ["precision=fp8_block", "precision.fp8_dispatch=true"],
    "offload to a file": ["recompute.offload=file", "recompute.offload_min_bytes=65536"],
}  # fmt: skip


def cases(models: Sequence[str], layouts: Sequence[str]) -> Iterator[tuple[str, str, str, list[str]]]:
    """(model, layout, variant, overrides) of each case that is a valid configuration: gqa has no up-projection, say."""
    for model in models:
        for layout in layouts:
            for name, words in {**SETS, **MORE}.items():
                overrides = [*COMMON, "precision=bf16", *MODELS[model], *LAYOUTS[layout], *words, *ONE_STEP]
                try:
                    validate(compose(overrides))
                except ConfigError:
                    continue
                yield model, layout, name, overrides


ONE_STEP = [
    "train.steps=1", "schedule.warmup_steps=1", "batch.global_batch_size=4", "batch.micro_batch_size=2",
    "telemetry.profile_memory_steps=1",
]  # fmt: skip


def measure(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each pipeline stage: measured and predicted bytes of each part."""
    with tempfile.TemporaryDirectory(prefix="memory-") as directory:
        cfg = compose([*overrides, f"run_dir={directory}/run"])
        layout = validate(cfg)
        job.prepare_data(cfg)
        launcher.start(cfg, layout)
        line = json.loads(Path(directory, "run", "metrics.jsonl").read_text().splitlines()[0])
    planned, rows = workload_of(cfg, layout), []
    for stage, memory in enumerate(predict(cfg, layout)):
        expected = (saved_per_micro_batch(planned, stage), memory.parameters, memory.gradients, memory.optimizer)
        row: dict[str, Any] = {"stage": stage}
        for part, value in zip(PARTS, expected, strict=True):
            row |= {part: line[part][stage], f"predicted_{part}": round(value)}
        row["relative_error"] = row[f"predicted_{PARTS[0]}"] / row[PARTS[0]] - 1
        row["static_exact"] = all(row[part] == row[f"predicted_{part}"] for part in PARTS[1:])
        rows.append(row)
    return rows


def run(models: Sequence[str], layouts: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each case and pipeline stage."""
    rows = []
    for model, layout, name, overrides in cases(models, layouts):
        for row in measure(overrides):
            rows.append({"model": model, "layout": layout, "variant": name, **row})
            Console(stderr=True).print(f"{model}, {layout}, {name}, stage {row['stage']}: {row['relative_error']:+.3%}")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person: MiB kept by a micro-batch."""
    shown = Table(title=f"Kept by one micro-batch, MiB; tolerance {TOLERANCE:.0%}")
    for column in ("model", "layout", "variant", "stage", "measured", "predicted", "error", "weights exact"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(
            row["model"], row["layout"], row["variant"], str(row["stage"]),
            *(f"{row[key] / 2**20:.2f}" for key in (PARTS[0], f"predicted_{PARTS[0]}")),
            f"{row['relative_error']:+.3%}", "yes" if row["static_exact"] else "NO",
        )  # fmt: skip
    return shown


def main() -> None:
    """Command line of `make bench-memory`. Exits with 1 if a prediction is outside the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="only these models (repeat the option)")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only these layouts (repeat the option)")
    parser.add_argument("--published", type=Path, metavar="FILE", help="compare with published peaks instead")
    arguments = parser.parse_args()
    if arguments.published:
        published_memory.show(arguments.published)
        return
    forkserver.begin()
    try:
        rows = run(arguments.model or list(MODELS), arguments.layout or list(LAYOUTS))
    finally:
        forkserver.kill()
    Console().print(table(rows))
    worst = max(abs(row["relative_error"]) for row in rows)
    exact = all(row["static_exact"] for row in rows)
    if not (arguments.model or arguments.layout):
        against = published_memory.summary(published_memory.DATA)
        summary = {"all_hold": exact and worst <= TOLERANCE, "max_relative_error": worst, "static_exact": exact}
        print(f"wrote {write('memory', {**summary, **against}, rows)}")
    sys.exit(0 if exact and worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
