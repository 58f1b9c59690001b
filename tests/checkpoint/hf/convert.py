"""The converter without a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.checkpoint.hf import writer
from moe_train.checkpoint.hf.workers import Alone
from moe_train.config.schema import Config
from tools.convert import make_plan


def convert(source: Path, target: Path, words: tuple[str, ...] = (), **options: Any) -> writer.Outcome:
    """Convert as `moe-convert source target` does. `options` are fields of ConvertConfig."""
    cfg = Config()
    for name, value in options.items():
        setattr(cfg.convert, name, value)
    return writer.run(make_plan(cfg, source, target, words), Alone(), threads=2)
