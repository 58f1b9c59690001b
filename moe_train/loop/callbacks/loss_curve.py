"""run_dir/loss.svg: training and validation loss over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.telemetry.registry import Place, metric, shown_in

NAME = "loss.svg"
_STYLES: dict[str, dict[str, Any]] = {
    "lm_loss": {"linewidth": 1},
    "valid_loss": {"marker": "o", "markersize": 3},
}
_MARGINS = (0.13, 0.12, 0.85, 0.81)  # left, bottom, width, height. A computed layout takes as long as the drawing
_MOST_POINTS = 2000  # of a curve: more cannot be seen, and make the file large


class LossCurve:
    """Collects the losses of the lines of metrics.jsonl, in constant memory, and draws them."""

    def __init__(self) -> None:
        self._curves = {row.name: _Points() for row in shown_in(Place.LOSS_CURVE)}

    def add(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, in the order of steps. Losses that are not finite (null) leave a gap."""
        for name, points in self._curves.items():
            if line.get(name) is not None and "step" in line:
                points.add(line["step"], line[name])

    def draw(self, path: Path, title: str, entropy: float | None = None) -> bool:
        """Write the picture. Returns False where there is no loss.

        Args:
            entropy: unigram entropy of the validation tokens, nats, drawn as a dashed line.

        Raises:
            OSError: it cannot be written.
        """
        curves = {name: points.kept() for name, points in self._curves.items()}
        if not any(curves.values()):
            return False
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}):
            figure = Figure(figsize=(7, 4))
            axes = figure.add_axes(_MARGINS)
            for name, points in curves.items():
                if points:
                    label = metric(name).label.removesuffix(" loss")
                    axes.plot(*zip(*points, strict=True), **_STYLES.get(name, {}), label=label)
            if entropy is not None:
                axes.axhline(entropy, linestyle="--", linewidth=1, color="gray", label="unigram entropy")
            axes.set(xlabel="step", ylabel=f"loss ({metric('lm_loss').unit})", title=title)
            axes.grid(alpha=0.3)
            axes.legend()
            figure.savefig(path, format="svg", metadata={"Date": None})
        return True


class _Points:
    """Every point at first, then every second, every fourth, ..., and always the last."""

    def __init__(self) -> None:
        self._stride, self._count = 1, 0
        self._points: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None

    def add(self, x: float, y: float) -> None:
        self._last = (x, y)
        if self._count % self._stride == 0:
            self._points.append(self._last)
        self._count += 1
        if len(self._points) > _MOST_POINTS:
            self._points, self._stride = self._points[::2], 2 * self._stride

    def kept(self) -> list[tuple[float, float]]:
        more = [] if self._last is None or self._points[-1] == self._last else [self._last]
        return [*self._points, *more]
