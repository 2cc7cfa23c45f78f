"""The curve of FID against CLIP score over guidance scales: what more guidance buys, and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipeline.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SERIES_COLOURS,
    TOP,
    WIDTH,
    Axis,
    Series,
    error_bar,
    legend_of,
    padded,
    short,
    x_tick,
    y_tick,
)
from pipeline.report.run import Evaluation, spread


@dataclass(frozen=True)
class Point:
    """One evaluation on a curve. bar: ends of FID's error bar."""

    guidance: float
    clip: float
    fid: float
    bar: tuple[float, float] | None


def pareto(evaluations: Sequence[Evaluation], fid: str) -> str:
    """A chart with a curve for each sampler and number of steps of which several guidance scales were evaluated, or ""
    where there is none. fid: name of the metric."""
    curves = {label: points for label, points in _curves(evaluations, fid).items() if len(points) > 1}
    if not curves:
        return ""
    every = [point for points in curves.values() for point in points]
    ends = [end for point in every for end in point.bar or () if end > 0]
    fids = [point.fid for point in every] + ends
    clips = [point.clip for point in every]
    air = 0.06 * (max(clips) - min(clips)) or 1.0
    x_axis = Axis.around(min(clips) - air, max(clips) + air, LEFT, WIDTH - RIGHT)
    y_axis = Axis.around(*padded(min(fids), max(fids), True), HEIGHT - BOTTOM, TOP, True)
    title = f"{fid} against CLIP score"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += [y_tick(value, y_axis) for value in y_axis.ticks(5)]
    parts += [x_tick(value, x_axis) for value in x_axis.ticks(6)]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">CLIP score (100 × cosine)</text>')
    for i, (label, points) in enumerate(curves.items()):
        parts.append(_curve(label, points, i, x_axis, y_axis))
    parts.append("</svg>")
    legend = legend_of([Series(label, (), colour=i) for i, label in enumerate(curves)])
    unit = '<span class="unit">log scale; lower right is better; numbers are guidance scales</span>'
    return f"<figure><figcaption>{escape(title)} {unit}</figcaption>{''.join(parts)}{legend}</figure>"


def _curves(evaluations: Sequence[Evaluation], fid: str) -> Mapping[str, list[Point]]:
    """Points by what they were made with besides the scale, in order of it."""
    found: dict[str, dict[float, Point]] = {}
    for e in evaluations:
        clip, value, guidance = (e.metrics.get(name) for name in ("clip_score", fid, "guidance"))
        if not e.name or guidance is None or not _positive(clip) or not _positive(value):
            continue
        assert isinstance(clip, int | float) and isinstance(value, int | float)
        point = Point(float(guidance), float(clip), float(value), spread(e.metrics, fid))
        found.setdefault(_label(e), {})[point.guidance] = point
    return {label: [points[scale] for scale in sorted(points)] for label, points in sorted(found.items())}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _label(e: Evaluation) -> str:
    """What tells curves apart."""
    card = e.card
    more = [f"{name} {value:g}" for name, value in (card.get("guidance_settings") or {}).items()]
    parts = [f"{card.get('sampler', '?')}, {card.get('steps', '?')} steps", *more, f"{e.metrics.get('images')} images"]
    if card.get("weights") == "raw":
        parts.append("raw weights")
    if card.get("seed"):
        parts.append(f"seed {json.dumps(card['seed'])}")
    return f"{', '.join(parts)}, at {short(e.n)}"


def _curve(label: str, points: Sequence[Point], number: int, x_axis: Axis, y_axis: Axis) -> str:
    colour = f"s{number % SERIES_COLOURS}"
    places = [(x_axis.at(point.clip), y_axis.at(point.fid)) for point in points]
    parts = [f'<path class="line {colour}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>']
    for point, (x, y) in zip(points, places, strict=True):
        if point.bar and all(y_axis.shows(end) for end in point.bar):
            parts.append(error_bar(colour, x, *map(y_axis.at, point.bar)))
        said = f"{label}, guidance {point.guidance:g}: FID {short(point.fid)}, CLIP score {point.clip:.2f}"
        parts.append(
            f'<circle class="dot {colour}" r="3" cx="{x}" cy="{y}"><title>{escape(said)}</title></circle>'
            f'<text class="level" x="{x + 5}" y="{y - 5}">{point.guidance:g}</text>'
        )
    return "".join(parts)
