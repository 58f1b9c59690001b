"""Muon on every layout of ranks, QK-Clip where attention would grow, and Muon against AdamW at equal tokens.

`make bench-optimizers` runs all three with `model=tiny`, prints tables and writes bench/results/optimizers.json. It
needs Python 3.12 and the extra muon.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.parity import LAYOUTS, LOSS_TOLERANCE, compare, measure
from bench.results import write
from launch import job
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from parallel.errors import ConfigError

MUON_LAYOUTS = (
    "dp2", "tp2", "pp2", "pp2 vpp2", "ep2", "cp2", "tp2 ep2", "tp2 etp2", "tp2 pp2 ep2", "ep4",
    "dp2, optimizer not distributed", "ep2, optimizer not distributed",
)  # fmt: skip
STEPS = 20
GROWING = ("parallel.tp=2", "optimizer.lr=3e-3", "model.init_std=0.1", "optimizer.weight_decay=0")
"""A run whose attention logits grow."""
UNLIMITED = 1e9
"""A threshold that no logit reaches: logits are measured."""
RATES = (1e-3, 3e-3)
SEEDS = (1, 2, 3)
COMPARED_STEPS = 300
COMPARED = (
    "model=tiny", "precision=fp32", "runtime=cpu", "train.eval_interval_steps=0", "train.eval_batches=8",
    "checkpoint.save_at_end=false", "telemetry.tensorboard=false", "telemetry.progress=false",
    "launcher.threads_per_rank=1", f"train.steps={COMPARED_STEPS}",
)  # fmt: skip


def layouts(names: Sequence[str] = MUON_LAYOUTS, steps: int = STEPS) -> list[dict[str, Any]]:
    """Losses of Muon on each layout against one rank: a row each."""
    common = ["optimizer=muon", f"train.steps={steps}"]
    reference, rows = measure(common), []
    for name in names:
        found = compare(reference, measure([*common, *LAYOUTS[name]]))
        difference = found["max_relative_loss_difference"]
        rows.append({"layout": name, "steps": steps, "max_relative_loss_difference": difference,
                     "holds": difference <= LOSS_TOLERANCE})  # fmt: skip
    return rows


def qk_clip(steps: int = 40) -> dict[str, Any]:
    """Largest attention logits where they grow, without QK-Clip and with half of the largest as threshold."""
    common = [*GROWING, f"train.steps={steps}"]

    def largest(threshold: float) -> list[float]:
        lines = measure([*common, f"optimizer.qk_clip_threshold={threshold}"])
        return [line["max_attention_logit"] for line in lines]

    free = largest(UNLIMITED)
    threshold = max(free) / 2
    clipped = largest(threshold)
    begin = next(i for i, logit in enumerate(clipped) if logit > threshold) + 1
    return {
        "qk_clip_steps": steps, "qk_clip_threshold": threshold, "largest_logit_without": max(free),
        "largest_logit_with": max(clipped), "first_clipped_step": begin,
        "largest_logit_after_it_over_threshold": max(clipped[begin:]) / threshold,
        "mean_logit_after_it_over_threshold": mean(clipped[begin:]) / threshold,
    }  # fmt: skip


def validation_loss(overrides: Sequence[str]) -> float:
    """Of the last evaluation of a run."""
    with tempfile.TemporaryDirectory(prefix="bench-optimizers-") as directory:
        cfg = compose([*COMPARED, *overrides, f"run_dir={directory}/run"])
        layout = validate(cfg)
        job.prepare_data(cfg)
        launcher.start(cfg, layout)
        lines = map(json.loads, Path(directory, "run", "metrics.jsonl").read_text().splitlines())
        return float([line["valid_loss"] for line in lines if "valid_loss" in line][-1])


def comparison(seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Validation loss of each optimizer, learning rate and seed after the same tokens."""
    return [
        {"optimizer": name, "lr": rate, "seed": seed,
         "valid_loss": validation_loss([f"optimizer={name}", f"optimizer.lr={rate}", f"seed={seed}"])}
        for name in ("adamw", "muon") for rate in RATES for seed in seeds
    ]  # fmt: skip


def summarise(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each optimizer the learning rate with the lowest mean loss, and in how many seeds Muon's is lower."""
    best: dict[str, Any] = {}
    for name in ("adamw", "muon"):
        by_rate = {
            rate: [row["valid_loss"] for row in compared if row["optimizer"] == name and row["lr"] == rate]
            for rate in RATES
        }
        rate = min(by_rate, key=lambda rate: mean(by_rate[rate]))
        best[name] = {"lr": rate, "mean_valid_loss": mean(by_rate[rate]), "valid_losses": by_rate[rate]}
    pairs = zip(best["muon"]["valid_losses"], best["adamw"]["valid_losses"], strict=True)
    return {"comparison": best, "seeds_in_which_muon_is_better": sum(muon < adamw for muon, adamw in pairs)}


def tables(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of layouts for a person."""
    shown = Table("layout", "steps", "largest relative loss difference", "holds", title="Muon against one rank")
    for row in rows:
        shown.add_row(row["layout"], str(row["steps"]), f"{row['max_relative_loss_difference']:.1e}", str(row["holds"]))
    return shown


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-comparison", action="store_true", help="leave the comparison with AdamW out")
    options = parser.parse_args()
    console = Console()
    try:
        rows = layouts()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    console.print(tables(rows))
    clipping = qk_clip()
    console.print_json(data=clipping)
    compared = [] if options.no_comparison else comparison()
    against = summarise(compared) if compared else {}
    console.print_json(data=against)
    worst = max(row["max_relative_loss_difference"] for row in rows)
    summary = {"muon_layouts_hold": all(row["holds"] for row in rows), "muon_largest_loss_difference": worst}
    console.print(write("optimizers", {**summary, **clipping, **against}, [*rows, *compared]), highlight=False)


if __name__ == "__main__":
    main()
