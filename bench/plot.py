"""Line charts as SVG, without a plotting library: what benchmarks put into the documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 300  # of one panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 40
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


@dataclass(frozen=True)
class Panel:
    """One chart.

    Args:
        title: what the vertical axis shows, with its unit.
        axis: what the horizontal axis shows.
        lines: name -> points, in the order of the legend.
        marks: heights of dashed lines across the chart.
    """

    title: str
    axis: str
    lines: Mapping[str, Points]
    marks: Sequence[float] = ()


def svg(panels: Sequence[Panel]) -> str:
    """The panels below each other. A name has one colour in all of them; values that are no numbers are left out."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    height = HEIGHT * len(panels)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11"',
        f' viewBox="0 0 {WIDTH} {height}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate(0 {i * HEIGHT})">', *_panel(panel, colours), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(panel: Panel, colours: Mapping[str, str]) -> list[str]:
    finite = [point for points in panel.lines.values() for point in points if math.isfinite(point[1])]
    xs, ys = [x for x, _ in finite], [*(y for _, y in finite), *panel.marks]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    margin = (y1 - y0 or 1) * 0.05
    y0, y1 = y0 - margin, y1 + margin

    def across(x: float) -> float:
        return LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text x="{LEFT}" y="{TOP - 12}" font-weight="bold">{escape(panel.title)}</text>']
    for y in ticks(y0, y1):
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 32}" text-anchor="middle">{escape(panel.axis)}</text>')
    for y in panel.marks:
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#888888" '
            'stroke-dasharray="6 4"/>'
        )
    for i, (name, points) in enumerate(panel.lines.items()):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points if math.isfinite(y))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.3"/>')
        height = TOP + 14 + 15 * i
        parts.append(f'<line x1="{right - 190}" x2="{right - 170}" y1="{height - 4}" y2="{height - 4}" '
                     f'stroke="{colours[name]}" stroke-width="2"/>')  # fmt: skip
        parts.append(f'<text x="{right - 164}" y="{height}">{escape(name)}</text>')
    return parts
