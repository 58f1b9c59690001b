"""The converter without a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.config.roots import ConvertRoot
from moe_train.formats import directory_writer
from moe_train.formats.communicator import SingleProcess
from tools.convert import make_plan


def convert(source: Path, target: Path, words: tuple[str, ...] = (), **options: Any) -> directory_writer.WriteResult:
    """Convert as `moe-convert source target` does. `options` are fields of ConvertConfig."""
    cfg = ConvertRoot()
    for name, value in options.items():
        setattr(cfg.convert, name, value)
    return directory_writer.run(make_plan(cfg, source, target, words), SingleProcess(), threads=2)
