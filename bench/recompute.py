"""Recomputation changes no bit: gradients and metrics of every layout with each recomputation set, against none.

`make parity-recompute` takes the layouts of `make parity` in fp32, two of them in bf16 and in FP8, with the sets of
`make bench-memory`, further sets within each other and, on pipelines, sets that differ between stages. Every rank
trains one step of two micro-batches with each set from the same weights and data, and compares every gradient, and
what the step logs (losses, balance losses, tokens of each expert, gradient norm), with what came out when everything
was kept. It writes bench/results/recompute.json; with `--layout` only the rows of those layouts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.parity import COMMON, LAYOUTS
from bench.recompute_sets import SETS as SINGLE
from bench.results import DIRECTORY, write
from launch import job
from launch.local import forkserver, launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from parallel.errors import ConfigError
from parallel.rank_info import RankInfo

MICRO_BATCHES = 2
CASES: dict[str, list[str]] = {
    "single": [],
    **LAYOUTS,
    "tp2 pp2 ep2, bf16": [*LAYOUTS["tp2 pp2 ep2"], "precision=bf16"],
    "pp2 ep2, fp8_block": [*LAYOUTS["pp2 ep2"], "precision=fp8_block"],
}
SHORT = ["train.steps=1", "schedule.warmup_steps=1"]
SETS: dict[str, list[str]] = {
    **{name: words for name, words in SINGLE.items() if name != "none"},
    "moe,moe_act,shared_experts,layernorm": [
        "recompute=selective", "recompute.modules=[moe,moe_act,shared_experts,layernorm]",
    ],
    "full on the first stage": ["recompute.stages=[{mode:full},{mode:none}]"],
    "other modules on each stage": [
        "recompute.stages=[{modules:[layernorm,mla_up_proj,moe_act]},{modules:[mlp,core_attn]}]"
    ],
    "other modules on each chunk": [
        "recompute.stages=[{mode:full},{modules:[moe]},{mode:none},{modules:[layernorm,core_attn]}]"
    ],
}  # fmt: skip


def sets_of(cfg: Config) -> dict[str, Config | str]:
    """`cfg` with each set, or why the set is refused there."""
    configs: dict[str, Config | str] = {}
    for name, words in SETS.items():
        changed = replace(cfg, recompute=compose(words).recompute)
        try:
            validate(changed)
        except ConfigError as error:
            configs[name] = error.cause
        else:
            configs[name] = changed
    return configs


def compare_sets(cfg: Config, rank: RankInfo) -> None:
    """On each rank: train with every set, and write the comparison to run_dir/rank_N.json. Called by the launcher."""
    import torch

    expected_gradients, expected_metrics = _train(cfg, rank)
    comparisons = {}
    for name, config in sets_of(cfg).items():
        if isinstance(config, str):
            continue
        gradients, metrics = _train(config, rank)
        comparisons[name] = {
            "max_abs_gradient_difference": max(
                float((a - b).abs().max()) for a, b in zip(expected_gradients, gradients, strict=True)
            ),
            "gradients_bit_identical": all(
                torch.equal(a.view(torch.int32), b.view(torch.int32))
                for a, b in zip(expected_gradients, gradients, strict=True)
            ),
            "metrics_identical": metrics == expected_metrics,
        }
    Path(cfg.run_dir, f"rank_{rank.rank}.json").write_text(
        json.dumps({"metrics": expected_metrics, "sets": comparisons})
    )


def _train(cfg: Config, rank: RankInfo) -> tuple[list[Any], dict[str, Any]]:
    """Every gradient of a step in fp32, and its metrics."""
    from moe_train import train
    from moe_train.data.datasets import build_datasets
    from moe_train.loop.step import train_step
    from parallel import groups

    groups.destroy()
    run = train.prepare(cfg, rank)
    data, _, _ = build_datasets(cfg, cfg.batch.global_batch_size, 0, 0)
    metrics = train_step(run, train.train_reader(run, data, 0).for_chunks(run.layout.vpp))
    return [p.main_grad.float().clone() for chunk in run.chunks for p in chunk.parameters()], metrics


def measure(words: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each set of one layout: the worst rank's gradients, and the balance loss that was logged."""
    with tempfile.TemporaryDirectory(prefix="recompute-") as directory:
        cfg = compose([*COMMON, *words, *SHORT, f"run_dir={directory}/run"])
        cfg.batch.global_batch_size = MICRO_BATCHES * validate(cfg).dp
        layout = validate(cfg)
        job.prepare_data(cfg)
        launcher.start(cfg, layout, "bench.recompute:compare_sets")
        ranks = [json.loads(path.read_text()) for path in sorted(Path(cfg.run_dir).glob("rank_*.json"))]
    rows = []
    for name, config in sets_of(cfg).items():
        row: dict[str, Any] = {"recompute": name}
        if isinstance(config, str):
            rows.append({**row, "refused": config})
            continue
        of_ranks = [rank["sets"][name] for rank in ranks]
        row["max_abs_gradient_difference"] = max(comparison["max_abs_gradient_difference"] for comparison in of_ranks)
        row |= {
            key: all(comparison[key] for comparison in of_ranks)
            for key in ("gradients_bit_identical", "metrics_identical")
        }
        rows.append({**row, "balance_loss": ranks[0]["metrics"]["seq_load_balancing_loss"], "ranks": len(ranks)})
    return rows


def holds(row: dict[str, Any]) -> bool:
    """Whether a row shows no difference; a set that the layout refuses says nothing."""
    return "refused" in row or (row["gradients_bit_identical"] and row["metrics_identical"])


def run(layouts: Sequence[str], common: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each layout and set. Without `common` overrides each layout is written as soon as it has finished."""
    rows = []
    for name in layouts:
        start = time.monotonic()
        rows_of_layout = [{"layout": name, **row} for row in measure([*CASES[name], *common])]
        rows += rows_of_layout
        if not common:
            save(rows_of_layout)
        different = [row["recompute"] for row in rows_of_layout if not holds(row)]
        shown = f"DIFFER: {'; '.join(different)}" if different else "no bit differs"
        Console(stderr=True).print(f"{name}: {len(rows_of_layout)} sets, {shown} ({time.monotonic() - start:.0f} s)")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person: one line for each layout."""
    shown = Table(title="Gradients and metrics against those without recomputation")
    for column in ("layout", "sets", "refused", "largest difference", "bit-identical", "metrics"):
        shown.add_column(column)
    for layout in dict.fromkeys(row["layout"] for row in rows):
        some = [row for row in rows if row["layout"] == layout]
        ran = [row for row in some if "refused" not in row]
        shown.add_row(
            layout, str(len(ran)), str(len(some) - len(ran)),
            f"{max(row['max_abs_gradient_difference'] for row in ran):g}",
            "yes" if all(row["gradients_bit_identical"] for row in ran) else "NO",
            "same" if all(row["metrics_identical"] for row in ran) else "DIFFER",
        )  # fmt: skip
    return shown


def main() -> None:
    """Command line of `make parity-recompute`. Exits with 1 if any bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", choices=list(CASES), help="only these (repeat the option)")
    parser.add_argument("overrides", nargs="*", help="further overrides, such as precision=fp8_block")
    arguments = parser.parse_args()
    forkserver.begin()
    try:
        rows = run(arguments.layout or list(CASES), arguments.overrides)
    finally:
        forkserver.kill()
    Console().print(table(rows))
    sys.exit(0 if all(map(holds, rows)) else 1)


def save(rows: Sequence[dict[str, Any]]) -> Path:
    """Write the rows, with those of other layouts that stood there before."""
    before = DIRECTORY / "recompute.json"
    others = json.loads(before.read_text())["rows"] if before.exists() else []
    new = {row["layout"] for row in rows}
    rows = [*(row for row in others if row["layout"] not in new), *rows]
    rows = sorted(rows, key=lambda row: list(CASES).index(row["layout"]))
    ran = [row for row in rows if "refused" not in row]
    summary = {
        "all_bit_identical": all(map(holds, rows)), "layouts": len({row["layout"] for row in rows}),
        "compared": len(ran),
        "max_abs_gradient_difference": max(row["max_abs_gradient_difference"] for row in ran),
    }  # fmt: skip
    return write("recompute", summary, rows)


if __name__ == "__main__":
    main()
