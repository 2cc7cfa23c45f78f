"""Histograms as inline SVG, in the look of the line charts: no script, colours from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, short

AIR = 12  # pixels between the highest bar and a mark's text
WIDEST = 64.0  # pixels of width of a bar
SMALLEST = 1.5  # pixels of height of a bar whose count is not 0


@dataclass(frozen=True)
class Bar:
    """One bar. label: what it counts, shown on hover."""

    label: str
    count: int


@dataclass(frozen=True)
class Histogram:
    """Adjacent bars. ticks and marks: (position along the bars, text), where 0 is the left edge of the first bar and 1
    that of the second. A mark is drawn as a dashed line with its text."""

    title: str
    unit: str
    x_label: str
    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str]] = ()


def bar_chart(histogram: Histogram) -> str:
    """A figure element, or "" when all counts are 0."""
    highest = max((bar.count for bar in histogram.bars), default=0)
    if not highest:
        return ""
    step = _round_step(highest)
    top = TOP + (AIR if histogram.marks else 0)
    scale = (HEIGHT - BOTTOM - top) / highest
    across = (WIDTH - LEFT - RIGHT) / len(histogram.bars)
    ground = HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(histogram.title)}">']
    for value in range(0, highest + 1, step):
        y = round(ground - value * scale, 1)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{short(value)}</text>'
        )
    width = min(across - min(2.0, across / 5), WIDEST)
    for i, bar in enumerate(histogram.bars):
        left, middle = LEFT + i * across, LEFT + (i + 0.5) * across
        height = round(max(bar.count * scale, SMALLEST), 1) if bar.count else 0
        parts.append(
            f"<g><title>{escape(bar.label)}: {bar.count:,}</title>"
            f'<rect class="hit" x="{left:.1f}" y="{top}" width="{across:.1f}" height="{ground - top}"/>'
            f'<rect class="bar" x="{middle - width / 2:.1f}" y="{ground - height:.1f}" width="{width:.1f}" '
            f'height="{height}"/></g>'
        )
    for place, text in histogram.ticks:
        parts.append(
            f'<text class="tick" x="{LEFT + place * across:.1f}" y="{ground + 17}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    for place, text in histogram.marks:
        x = LEFT + place * across
        side, shift = ("start", 5) if x < (LEFT + WIDTH) / 2 else ("end", -5)
        parts.append(
            f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{ground}"/>'
            f'<text class="level" x="{x + shift:.1f}" y="{TOP}" text-anchor="{side}">{escape(text)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(histogram.x_label)}</text></svg>')
    unit = f' <span class="unit">{escape(histogram.unit)}</span>'
    return f"<figure><figcaption>{escape(histogram.title)}{unit}</figcaption>{''.join(parts)}</figure>"


def _round_step(highest: int) -> int:
    """1, 2 or 5 times a power of ten, so that about four steps lead to `highest`."""
    rough = max(highest / 4, 1)
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
