"""Line charts as inline SVG: no script, no network; colours come from the page's CSS (light and dark).

A chart is drawn in units of one pixel at its natural width and scales with the page. Hovering over a point shows its
values (SVG titles); the page's tables hold the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.report.elements import text

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 40  # pixels of margin, which hold labels
TEXT_HEIGHT = 14
MOST_POINTS = 240  # longer curves are averaged in bins before drawing
SERIES_COLOURS = 6  # classes s0 to s5 of the stylesheet, reused beyond
SMALLEST, LARGEST = 1e-30, 1e30
"""Sizes of numbers between which an axis can be divided; smaller ones are 0, and larger ones are not drawn."""


@dataclass(frozen=True)
class Series:
    """One curve. colour: index of its CSS class. smooth: draw it pale, under its running mean. dots: draw one at each
    point. bars: x -> lower and upper end of its error bar."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    smooth: bool = False
    dots: bool = False
    bars: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line: a target, or the floor of a metric."""

    label: str
    y: float


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "samples seen",
    y_label: str = "",
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    levels: Sequence[Level] = (),
    log_x: bool = False,
    x_ticks: Sequence[float] = (),
) -> str:
    """A figure element with the chart and its legend, or "" when no value is finite.

    log_x, log_y: logarithmic axes, which leave out values that are not positive. y_range: fixed limits, such as (0, 1).
    x_ticks: values under the x axis; () = round ones.
    """
    if log_x:
        series = [replace(curve, points=[point for point in curve.points if point[0] >= SMALLEST]) for curve in series]
    curves = [
        (curve, _thin([(x, _zeroed(y)) for x, y in curve.points if _drawable((x, y), log_y)])) for curve in series
    ]
    curves = [(curve, points) for curve, points in curves if points]
    if not curves:
        return ""
    levels = [level for level in levels if _drawable((0.0, level.y), log_y)]
    xs = [_zeroed(x) for curve, _ in curves for x, y in curve.points if _drawable((x, y), log_y)]
    ys = [y for _, points in curves for _, y in points] + [_zeroed(level.y) for level in levels]
    ys += [_zeroed(y) for curve, _ in curves for bar in curve.bars.values() for y in bar if _drawable((0.0, y), log_y)]
    left, right = padded(min(xs), max(xs), True) if log_x else (0.0 if min(xs) >= 0 else min(xs), max(xs))
    x_axis = Axis.around(left, right, LEFT, WIDTH - RIGHT, log_x)
    low, high = y_range or padded(min(ys), max(ys), log_y)
    y_axis = Axis.around(low, high, HEIGHT - BOTTOM, TOP, log_y)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">']
    parts += [y_tick(value, y_axis) for value in y_axis.ticks(5)]
    parts += [x_tick(value, x_axis) for value in x_ticks or x_axis.ticks(6)]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_label)}</text>')
    parts += _levels(levels, y_axis)
    parts += [_curve(curve, points, x_axis, y_axis, x_label) for curve, points in curves]
    parts.append("</svg>")
    legend = legend_of([curve for curve, _ in curves]) if len(curves) > 1 else ""
    unit = f' <span class="unit">{text(y_label)}</span>' if y_label else ""
    return f"<figure><figcaption>{text(title)}{unit}</figcaption>{''.join(parts)}{legend}</figure>"


def short(value: float) -> str:
    """A number in few characters: 12.3k, 0.0041, 3e-06."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    magnitude = abs(value)
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if magnitude >= bound:
            return f"{value / bound:.4g}{suffix}"
    return f"{value:.3g}"


# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Values from low to high on pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, low: float, high: float, start: float, end: float, log: bool = False) -> Axis:
        return cls(low, high if high > low else low + (abs(low) or 1.0), start, end, log)

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def shows(self, value: float) -> bool:
        """Whether the value can be drawn on this axis."""
        return abs(value) <= LARGEST and (value > 0 or not self.log)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers inside the axis: 1, 2 or 5 times a power of ten."""
        if self.log:
            decades = math.log10(self.high / self.low)
            digits = (1, 2, 3, 5) if decades < 1.3 else (1, 2, 5) if decades < 2.2 else (1,)
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
            inside = [mark for mark in marks if self.low <= mark <= self.high]
            if len(inside) >= 2:
                return inside
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _drawable(point: tuple[float, float], log_y: bool) -> bool:
    x, y = point
    return abs(x) <= LARGEST and abs(y) <= LARGEST and (y >= SMALLEST or not log_y)


def _zeroed(value: float) -> float:
    return value if abs(value) >= SMALLEST else 0.0


def padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """Limits with a margin around the values."""
    if log:
        factor = max((high / low) ** 0.06, 1.02)
        return low / factor, high * factor
    air = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return (0.0 if 0 <= low < 0.5 * high else low - air), high + air


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points in order of x: means over bins of equally many points."""
    ordered = sorted(points)
    size = -(-len(ordered) // MOST_POINTS)
    if size <= 1:
        return ordered
    bins = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over about a twentieth of the curve, narrower at its ends."""
    reach = max(len(points) // 40, 1)
    smooth = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        window = points[i - side : i + side + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def _curve(series: Series, points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    colour = f"s{series.colour % SERIES_COLOURS}"
    parts = []
    if series.smooth and len(points) > 20:
        parts.append(f'<path class="line raw {colour}" d="{_path(points, x_axis, y_axis)}"/>')
        points = _smoothed(points)
    parts.append(f'<path class="line {colour}" d="{_path(points, x_axis, y_axis)}"/>')
    for x, y in points:
        element = (
            f'<circle class="dot {colour}" r="3"' if series.dots or len(points) == 1 else '<circle class="hit" r="7"'
        )
        title = f"{series.label}: {short(y)} at {short(x)} {x_label}"
        if bar := series.bars.get(x):
            title += f" ({short(bar[0])} to {short(bar[1])})"
            if y_axis.shows(bar[0]) and y_axis.shows(bar[1]):
                parts.append(error_bar(colour, x_axis.at(x), y_axis.at(bar[0]), y_axis.at(bar[1])))
        parts.append(f'{element} cx="{x_axis.at(x)}" cy="{y_axis.at(y)}"><title>{text(title)}</title></circle>')
    return "".join(parts)


def error_bar(colour: str, x: float, low: float, high: float) -> str:
    """From low to high, in pixels, with short ends."""
    return f'<path class="bar-ends {colour}" d="M{x} {low}V{high}M{x - 3} {low}h6M{x - 3} {high}h6"/>'


def _path(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    return "M" + "L".join(f"{x_axis.at(x)} {y_axis.at(y)}" for x, y in points)


def y_tick(value: float, axis: Axis) -> str:
    """A line across the chart, and its value beside it."""
    y = axis.at(value)
    return (
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{short(value)}</text>'
    )


def x_tick(value: float, axis: Axis) -> str:
    """A value beneath the chart."""
    x, y = axis.at(value), HEIGHT - BOTTOM
    return f'<text class="tick" x="{x}" y="{y + 17}" text-anchor="middle">{short(value)}</text>'


def _levels(levels: Sequence[Level], axis: Axis) -> list[str]:
    """Lines of the levels and a label above each. Levels whose labels would overlap share one."""
    lines: list[str] = []
    groups: list[tuple[float, list[str]]] = []
    for level in sorted(levels, key=lambda level: level.y, reverse=True):  # from the top of the chart down
        y, label = axis.at(level.y), f"{text(level.label)} {short(level.y)}"
        lines.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        if groups and y - groups[-1][0] < TEXT_HEIGHT:
            groups[-1][1].append(label)
        else:
            groups.append((y, [label]))
    labels = [
        f'<text class="level" x="{WIDTH - RIGHT}" y="{y - 5}" text-anchor="end">{", ".join(together)}</text>'
        for y, together in groups
    ]
    return lines + labels


def legend_of(series: Sequence[Series]) -> str:
    """A list of the curves' labels."""
    items = (
        f'<li><span class="swatch s{curve.colour % SERIES_COLOURS}"></span>{text(curve.label)}</li>' for curve in series
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
