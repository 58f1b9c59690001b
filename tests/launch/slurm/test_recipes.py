"""Each model has a recipe that passes every rule, fits its GPUs and has a time, for new weights and for old ones."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from launch.slurm.estimate import Pace, RunEstimate, pace, run_estimate
from moe_train.config.composition.compose import compose
from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from parallel.layout import ParallelLayout
from parallel.planner.hardware import Hardware

MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
LARGE = [name for name in MODELS if name != "tiny"]
DOCS = CONF_DIR.parent / "docs" / "models.md"


@cache
def recipe(name: str, *more: str) -> tuple[Config, ParallelLayout, RunEstimate]:
    cfg = compose([f"experiment={name}/pretrain", "data=indexed", *more])
    layout = validate(cfg)
    return cfg, layout, run_estimate(cfg, layout)


def time_of(name: str) -> Pace:
    found = recipe(name)[2].pace
    assert found is not None
    return found


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_fits_its_gpus_and_ends_within_a_year(name: str) -> None:
    cfg, layout, found = recipe(name)
    assert cfg.model.name == name
    assert found.usable_gib is not None
    assert found.memory_gib < found.usable_gib
    assert layout.world_size % cfg.launcher.ranks_per_node == 0
    assert Hardware.of(cfg.cluster).refusal(cfg.precision.fp8) is None
    time = time_of(name)
    assert 0.15 < time.mfu < 0.6
    assert 5 < time.hours / 24 < 365


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_leaves_nothing_as_it_suits_a_laptop(name: str) -> None:
    cfg, _, found = recipe(name)
    assert cfg.precision.dtype != "fp32"
    assert cfg.train.seq_length >= 4096
    assert 1e-4 <= cfg.optimizer.lr <= 5e-4
    assert cfg.batch.global_batch_size >= 1024
    assert cfg.schedule.warmup_steps >= 500
    assert cfg.checkpoint.interval_steps
    assert cfg.launcher.environment
    assert found.tokens >= 1e12


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_says_where_its_numbers_are_from(name: str) -> None:
    text = (CONF_DIR / "experiment" / name / "pretrain.yaml").read_text()
    head = "".join(line for line in text.splitlines(keepends=True)[1:6] if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}|technical report|published no training", head)


def test_the_smallest_recipe_takes_minutes_on_one_core() -> None:
    cfg, layout, found = recipe("tiny", "runtime=cpu", "data=stdlib")
    assert layout.world_size == 1
    assert found.memory_gib < 1
    assert pace(cfg, layout, found.tokens).hours < 10 / 60


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_can_continue_from_weights(name: str, tmp_path: Path) -> None:
    """The second experiment changes the length and the learning rate, and keeps layout, batch and precision."""
    cfg = compose([f"experiment=[{name}/pretrain,continue]", f"init_from={tmp_path}", "data=indexed", "runtime=cuda"])
    layout = validate(cfg)
    first, its_layout, _ = recipe(name, "runtime=cuda")
    assert (layout, cfg.batch, cfg.precision, cfg.recompute) == (
        its_layout, first.batch, first.precision, first.recompute,
    )  # fmt: skip
    assert (cfg.optimizer.lr, cfg.schedule.decay, cfg.train.tokens) == (3e-5, "cosine", 20_000_000_000)
    found = run_estimate(cfg, layout)
    assert found.pace is not None
    assert found.usable_gib is not None
    assert found.memory_gib < found.usable_gib
    assert found.pace.hours > 0


def row(name: str) -> str:
    """A line of docs/models.md."""
    cfg, layout, found = recipe(name)
    hours = time_of(name).hours
    millions = hours * layout.world_size * cfg.cluster.dollars_per_gpu_hour / 1e6
    degrees = " ".join(f"{key}{getattr(layout, key)}" for key in ("tp", "pp", "vpp", "ep", "dp"))
    again = cfg.recompute.mode if cfg.recompute.mode != "selective" else "+".join(cfg.recompute.modules)
    return (
        f"| {name} | {layout.world_size:,} {cfg.cluster.name} | {degrees} | {cfg.precision.name} | {again} | "
        f"{cfg.batch.global_batch_size * cfg.train.seq_length / 1e6:.0f}M | {(cfg.train.tokens or 0) / 1e12:g}T | "
        f"{found.memory_gib:.0f} | {hours / 24:,.0f} | {millions:,.1f} |"
    )


def test_the_table_of_recipes_is_what_the_planner_says() -> None:
    lines = DOCS.read_text().splitlines()
    missing = [row(name) for name in LARGE if row(name) not in lines]
    assert not missing, "\n".join(missing)
