"""Samples on a page: every evaluation's sheet of tiles is embedded once, and the browser cuts tiles from it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from pipeline.report.run import Evaluation, Run

COLUMNS_OVER_TIME = 8  # evaluations shown side by side
CAPTIONS_OVER_TIME = 8
CRISP_BELOW = 128  # pixels of width; smaller tiles are enlarged without smoothing


def final(run: Run, heading: bool = True) -> str:
    """The samples of the last evaluation, each above its caption."""
    last = run.last
    if last is None or not _has_tiles(last):
        return ""
    style = f"<style>{_sheet_rule(run, last)}</style>"
    tiles = "".join(
        f'<div class="sample">{_tile(run, last, i)}{escape(caption)}</div>'
        for i, caption in enumerate(last.tiles["captions"])
    )
    title = f"<h2>Samples after {last.n:,} images</h2>" if heading else "<h3>Samples</h3>"
    return f'{style}{title}<div class="samples">{tiles}</div>'


def over_time(run: Run) -> str:
    """The same captions from the same noise at several evaluations: a row for each caption."""
    columns = _evenly_spaced([e for e in run.training_evaluations if _has_tiles(e)], COLUMNS_OVER_TIME)
    if len(columns) < 2:
        return ""
    captions = columns[-1].tiles["captions"][:CAPTIONS_OVER_TIME]
    rules = "".join(_sheet_rule(run, e) for e in columns if e is not run.last)
    head = "<th></th>" + "".join(f"<th>{e.n:,}</th>" for e in columns)
    rows = "".join(
        f"<tr><td>{escape(caption)}</td>{''.join(f'<td>{_tile(run, e, i)}</td>' for e in columns)}</tr>"
        for i, caption in enumerate(captions)
    )
    return (
        f"<style>{rules}</style><h2>The same captions and noise, as training went on</h2>"
        f'<div class="scroll"><table class="strip"><tr>{head}</tr>{rows}</table></div>'
    )


def _has_tiles(evaluation: Evaluation) -> bool:
    return bool(evaluation.grid and evaluation.tiles.get("captions"))


def _evenly_spaced(evaluations: Sequence[Evaluation], most: int) -> list[Evaluation]:
    """At most `most` evaluations: the first, the last, and evenly spaced ones between them."""
    if len(evaluations) <= most:
        return list(evaluations)
    return [evaluations[round(i * (len(evaluations) - 1) / (most - 1))] for i in range(most)]


def _name(run: Run, evaluation: Evaluation) -> str:
    """CSS class of an evaluation's sheet; unique on the page, and free of characters from outside."""
    return f"g{hashlib.sha256(run.url.encode()).hexdigest()[:12]}-{evaluation.n}"


def _sheet_rule(run: Run, evaluation: Evaluation) -> str:
    data = base64.b64encode(evaluation.grid).decode()
    return f".{_name(run, evaluation)}{{background-image:url(data:image/png;base64,{data})}}"


def _tile(run: Run, evaluation: Evaluation, index: int) -> str:
    """One tile of the sheet, as an element that scales with its column.

    Percentages of background-size and -position are relative to the element, so they follow from the sheet's geometry
    in units of one tile.
    """
    tiles = evaluation.tiles
    width, height, gap, columns = tiles["width"], tiles["height"], tiles["gap"], tiles["columns"]
    rows = -(-len(tiles["captions"]) // columns)
    sheet_w, sheet_h = columns * (width + gap) - gap, rows * (height + gap) - gap
    left, top = (index % columns) * (width + gap), (index // columns) * (height + gap)
    x = 100 * left / (sheet_w - width) if sheet_w > width else 0
    y = 100 * top / (sheet_h - height) if sheet_h > height else 0
    crisp = " crisp" if width < CRISP_BELOW else ""
    size = f"{100 * sheet_w / width:.3f}% {100 * sheet_h / height:.3f}%"
    style = f"aspect-ratio:{width}/{height};background-size:{size};background-position:{x:.3f}% {y:.3f}%"
    label = escape(tiles["captions"][index])
    return f'<span class="tile{crisp} {_name(run, evaluation)}" role="img" aria-label="{label}" style="{style}"></span>'
