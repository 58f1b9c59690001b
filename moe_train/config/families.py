"""Names of the model families: those of the files of `moe_train/conversion/families`, which are not imported."""

from __future__ import annotations

from pathlib import Path

_FILES = Path(__file__).parents[1] / "conversion" / "families"


def family_names() -> tuple[str, ...]:
    """Values of `model.family`, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FILES.glob("[!_]*.py")))
