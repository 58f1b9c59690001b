"""run_dir/loss.svg: the losses of a run over its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAME = "loss.svg"
_MOST_POINTS = 2000  # of a curve: more cannot be seen, and make the file large


def draw(lines: Iterable[Mapping[str, Any]], path: Path, title: str, entropy: float | None = None) -> bool:
    """Draw training and validation loss of the lines of metrics.jsonl. Returns False where none has a finite loss.

    Args:
        entropy: unigram entropy of the validation tokens, nats, drawn as a dashed line.
    """
    curves: dict[str, list[tuple[float, float]]] = {"lm_loss": [], "valid_loss": []}
    for line in lines:
        for name, points in curves.items():
            if line.get(name) is not None and "step" in line:
                points.append((line["step"], line[name]))
    if not any(curves.values()):
        return False
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        training, validation = (_thinned(points) for points in curves.values())
        if training:
            axes.plot(*zip(*training, strict=True), linewidth=1, label="training")
        if validation:
            axes.plot(*zip(*validation, strict=True), marker="o", markersize=3, label="validation")
        if entropy is not None:
            axes.axhline(entropy, linestyle="--", linewidth=1, color="gray", label="unigram entropy")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` of them, evenly, and the last."""
    stride = -(-len(points) // _MOST_POINTS) or 1
    return points[::stride] if not points or points[::stride][-1] == points[-1] else [*points[::stride], points[-1]]
