"""The top of a run's page: how long it was, and cards with the figures that it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.tasks.figures import CLIP_SCORE, FIRST_STAGE_COSTS, Figure
from pipeline.config.tasks.found import BOUNDS, present
from pipeline.report.charts import short
from pipeline.report.elements import text
from pipeline.report.parsed import is_number
from pipeline.report.run import Run, spread
from pipeline.report.tables import duration, fids_of, heading


def subtitle(run: Run) -> str:
    start = run.starts[-1] if run.starts else {}
    parts = [f"{short(run.samples)} samples seen"]
    if start.get("world"):
        parts.append(f"{start['world']} ranks")
    parts.append("no restarts" if not run.restarts else f"{run.restarts} restart{'s' * (run.restarts > 1)}")
    if run.seconds > 0:
        parts.append(f"{duration(run.seconds)} of training and evaluation")
    return f'<p class="soft">{text(" · ".join(parts))}</p>'


def headline(run: Run, targets: Mapping[str, float]) -> str:
    """Cards with the figures of the last evaluation inside training, the training speed and the time of all steps."""
    cards: list[str] = []
    if run.last:
        metrics = run.last.metrics
        of_figures = [(f, _figure_card(name, f, metrics, targets.get(f.name))) for name, f in present(metrics)]
        costs = [card for figure, card in of_figures if figure in FIRST_STAGE_COSTS]
        cards += [card for f, card in of_figures if f is not CLIP_SCORE and f not in FIRST_STAGE_COSTS]
        cards += [_fid_card(name, metrics, targets.get("fid_ratio")) for name in fids_of(metrics)]
        cards += [*(card for figure, card in of_figures if figure is CLIP_SCORE), *costs]
    rates = [rate for _, rate in run.curve("images_per_s")]
    if rates:
        cards.append(_card("training speed", f"{sorted(rates)[len(rates) // 2]:.0f}", ["images/s, median"]))
    if run.steps:
        seconds, limit = sum(step.seconds for step in run.steps), targets.get("seconds")
        reached = None if limit is None else (f"target ≤ {duration(limit)}", seconds <= limit)
        cards.append(_card("time of all steps", duration(seconds), [], reached))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


IN_WORDS = {
    "real": "real images",
    "reconstruction": "reconstructions",
    "baseline": "trivial method",
    "permuted": "conditions permuted",
}
"""What a figure lies between, in words."""


def _figure_card(name: str, figure: Figure, metrics: Mapping[str, Any], target: float | None) -> str:
    value, notes = metrics[name], _error_bar_notes(name, metrics)
    for ending in BOUNDS:
        if is_number(bound := metrics.get(f"{name}_{ending}")):
            notes.append(f"{IN_WORDS[ending]} {bound:.{figure.digits}f}")
    notes += [figure.unit] if figure.kind != "share" else []
    reached = None
    if target is not None:
        sign, met = ("≤", value <= target) if figure.better == "lower" else ("≥", value >= target)
        reached = f"target {sign} {target:g}", met
    return _card(heading(name, figure), f"{value:.{figure.digits}f}", notes, reached)


def _fid_card(name: str, metrics: Mapping[str, Any], target: float | None) -> str:
    value, floor = metrics[name], metrics.get(f"{name}_floor_reconstruction")
    notes = _error_bar_notes(name, metrics) + (
        [] if not floor else [f"autoencoder floor {short(floor)}: {value / floor:.2f}×"]
    )
    real = metrics.get(f"{name}_floor_real")
    if floor is None and real is not None:
        notes.append(f"real images {short(real)}")
    reached = None if target is None or not floor else (f"target ≤ {target:g}× floor", value <= target * floor)
    return _card(name, short(value), notes, reached)


def _error_bar_notes(name: str, metrics: Mapping[str, Any]) -> list[str]:
    """A figure's error bar in words; [] when it has none."""
    bar = spread(metrics, name)
    return [f"{short(bar[0])} to {short(bar[1])}"] if bar else []


def _card(label: str, value: str, notes: Sequence[str], target: tuple[str, bool] | None = None) -> str:
    lines = [f"<span>{text(note)}</span>" for note in notes]
    if target:
        aim, is_met = target
        kind, outcome = ("met", "reached") if is_met else ("missed", "not reached")
        lines.append(f'<span class="{kind}">{text(aim)}: {outcome}</span>')
    return f'<div class="card"><span>{text(label)}</span><b>{text(value)}</b>{"".join(lines)}</div>'
