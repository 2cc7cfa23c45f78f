"""FID against CLIP score over guidance scales: what more guidance gains and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SERIES_COLOURS,
    SMALLEST,
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
from pipeline.report.elements import text
from pipeline.report.parsed import LARGEST, is_number
from pipeline.report.run import Evaluation, spread
from pipeline.report.tables import MEASURES


@dataclass(frozen=True)
class Point:
    """One evaluation on a curve. bar: ends of FID's error bar."""

    guidance: float
    clip: float
    fid: float
    bar: tuple[float, float] | None


def pareto(evaluations: Sequence[Evaluation], fid: str) -> str:
    """A chart with one curve for each sampler and number of steps that was evaluated at several guidance scales; ""
    when there is none. fid: name of the metric."""
    curves = {label: points for label, points in _curves(evaluations, fid).items() if len(points) > 1}
    if not curves:
        return ""
    all_points = [point for points in curves.values() for point in points]
    ends = [end for point in all_points for end in point.bar or () if SMALLEST <= end <= LARGEST]
    fids = [point.fid for point in all_points] + ends
    clips = [point.clip for point in all_points]
    air = 0.06 * (max(clips) - min(clips)) or 1.0
    x_axis = Axis.around(min(clips) - air, max(clips) + air, LEFT, WIDTH - RIGHT)
    y_axis = Axis.around(*padded(min(fids), max(fids), True), HEIGHT - BOTTOM, TOP, True)
    title = f"{fid} against CLIP score"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">']
    parts += [y_tick(value, y_axis) for value in y_axis.ticks(5)]
    parts += [x_tick(value, x_axis) for value in x_axis.ticks(6)]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">CLIP score (100 × cosine)</text>')
    for i, (label, points) in enumerate(curves.items()):
        parts.append(_curve(label, points, i, x_axis, y_axis))
    parts.append("</svg>")
    legend = legend_of([Series(label, (), colour=i) for i, label in enumerate(curves)])
    unit = '<span class="unit">log scale; lower right is better; numbers are guidance scales</span>'
    return f"<figure><figcaption>{text(title)} {unit}</figcaption>{''.join(parts)}{legend}</figure>"


def _curves(evaluations: Sequence[Evaluation], fid: str) -> Mapping[str, list[Point]]:
    """label -> points in order of guidance scale. A label names all settings but the scale, and what the figures were
    measured against where that differs."""
    named = [evaluation for evaluation in evaluations if evaluation.name and fid in evaluation.metrics]
    differing = {name: measure for name, measure in MEASURES.items() if len(set(map(measure, named))) > 1}
    by_label: dict[str, dict[float, Point]] = {}
    for evaluation in evaluations:
        clip, value, guidance = (evaluation.metrics.get(name) for name in ("clip_score", fid, "guidance"))
        if not evaluation.name or not is_number(guidance) or not _positive(clip) or not _positive(value):
            continue
        assert isinstance(clip, int | float) and isinstance(value, int | float) and isinstance(guidance, int | float)
        point = Point(float(guidance), float(clip), float(value), spread(evaluation.metrics, fid))
        against = [f"{name} {measure(evaluation) or 'none'}" for name, measure in differing.items()]
        by_label.setdefault(_label(evaluation, against), {})[point.guidance] = point
    return {label: [points[scale] for scale in sorted(points)] for label, points in sorted(by_label.items())}


def _positive(value: Any) -> bool:
    return is_number(value) and value >= SMALLEST


def _label(evaluation: Evaluation, against: Sequence[str]) -> str:
    """The settings that distinguish an evaluation's curve. against: what its figures were measured against."""
    card = evaluation.card
    guidance_settings = [f"{name} {value:g}" for name, value in (card.get("guidance_settings") or {}).items()]
    parts = [
        f"{card.get('sampler', '?')}, {card.get('steps', '?')} steps",
        *guidance_settings,
        f"{evaluation.metrics.get('images')} images",
    ]
    if card.get("weights") not in (None, "", "ema"):
        parts.append(f"{card['weights']} weights")
    if card.get("seed"):
        parts.append(f"seed {json.dumps(card['seed'])}")
    return f"{', '.join([*parts, *against])}, at {short(evaluation.n)}"


def _curve(label: str, points: Sequence[Point], number: int, x_axis: Axis, y_axis: Axis) -> str:
    colour = f"s{number % SERIES_COLOURS}"
    pixels = [(x_axis.at(point.clip), y_axis.at(point.fid)) for point in points]
    parts = [f'<path class="line {colour}" d="M{"L".join(f"{x} {y}" for x, y in pixels)}"/>']
    for point, (x, y) in zip(points, pixels, strict=True):
        if point.bar and all(y_axis.shows(end) for end in point.bar):
            parts.append(error_bar(colour, x, *map(y_axis.at, point.bar)))
        title = f"{label}, guidance {point.guidance:g}: FID {short(point.fid)}, CLIP score {point.clip:.2f}"
        parts.append(
            f'<circle class="dot {colour}" r="3" cx="{x}" cy="{y}"><title>{text(title)}</title></circle>'
            f'<text class="level" x="{x + 5}" y="{y - 5}">{point.guidance:g}</text>'
        )
    return "".join(parts)
