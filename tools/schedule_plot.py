"""The schedules of a run as a picture (PNG)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.quantities import BATCH, LR

if TYPE_CHECKING:
    from tools.schedule import Curves, MeasuredRates

_POINTS = 800
_WIDTH, _HEIGHT = 8.0, 1.9  # inches, of each panel


def draw(path: Path, curves: Curves, measured: MeasuredRates | None) -> None:
    """A panel for each quantity, over training tokens; what a run has done in another colour.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    end, names = curves.progress.run_tokens, curves.quantities
    even = {end * number // _POINTS for number in range(_POINTS + 1)}
    jumps = {max(0, tokens - 1) for tokens in curves.boundaries()}
    tokens = sorted(even | jumps | set(curves.boundaries()))
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        style = "steps-post" if name == BATCH else "default"
        axes.plot(tokens, [curves.value(name, one) for one in tokens], drawstyle=style, linewidth=1.2)
        if measured and name == LR and measured.rates:
            axes.plot(*zip(*measured.rates, strict=True), linewidth=1.2, linestyle="--", label="measured")
            axes.legend()
        if measured:
            axes.axvline(measured.tokens, linewidth=0.8, color="gray")
        axes.set(ylabel=name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[-1].set(xlabel="training tokens")
    figure.suptitle(curves.cfg.model.name)
    figure.savefig(path, format="png", dpi=120)
