"""A run with text, and its export, that the tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.fault_runs import SMALL
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate


@pytest.fixture(scope="session")
def run_dir(small_data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on one rank, with evaluations, a checkpoint and an export in `hf/`."""
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    cfg = compose([
        *SMALL, *small_data, "model.num_layers=4", "model.init_std=0.1", "train.eval_batches=3", "train.steps=4",
        "export_hf=true", "optimizer.lr=1e-2", "schedule.warmup_steps=1", f"run_dir={directory}",
    ])  # fmt: skip
    launcher.start(cfg, validate(cfg))
    return directory


@pytest.fixture(scope="session")
def exported(run_dir: Path) -> Path:
    """Its weights in Hugging Face format."""
    (found,) = (run_dir / "hf").iterdir()
    return found
