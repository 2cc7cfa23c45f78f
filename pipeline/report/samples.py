"""Samples on a page: every evaluation's sheet of tiles is embedded once, and the browser cuts tiles from it."""

from __future__ import annotations

import base64
import hashlib

from pipeline.report.elements import text
from pipeline.report.parsed import Tiles, said, steered_beside_plain
from pipeline.report.run import SHEETS, Evaluation, Run, evenly_spaced

CAPTIONS_OVER_TIME = 8
LONGEST = 2000  # characters of a caption
GIVEN = "-given"  # end of the CSS class of the sheet of what was given
CRISP_BELOW = 128  # pixels of width; smaller tiles are enlarged without smoothing


def final(run: Run, heading: bool = True) -> str:
    """The samples of the last evaluation, each above its caption."""
    last = run.last
    if last is None or last.tiles is None:
        return ""
    style = f"<style>{_sheet_rule(run, last)}{_given_rule(run, last)}</style>"
    tiles = "".join(
        f'<div class="sample">{_pair(run, last, last.tiles, i)}{text(caption, LONGEST)}</div>'
        for i, caption in enumerate(last.tiles.captions)
    )
    name, note = "Samples", "Left of each sample: what it was given." if last.given else ""
    if last.reconstructs:
        name, note = (
            "Worst reconstructions",
            "Left of each: the picture; right: its reconstruction. Below: the record, and PSNR.",
        )
    after = f" after {last.n:,} images" if last.n or not last.reconstructs else ""
    title = f"<h2>{name}{after}</h2>" if heading else f"<h3>{name}</h3>"
    note = f'<p class="soft">{note}</p>' if note else ""
    return f'{style}{title}{note}<div class="samples{" pairs" if last.given else ""}">{tiles}</div>'


def over_time(run: Run) -> str:
    """What was given and the same noise at several evaluations: a row for each caption, or what else was given."""
    drawn = [(e, e.tiles) for e in run.training_evaluations if e.tiles]
    captions = drawn[-1][1].captions[:CAPTIONS_OVER_TIME] if drawn else []
    columns = evenly_spaced([(e, t) for e, t in drawn if t.captions[: len(captions)] == captions], SHEETS)
    if len(columns) < 2:
        return ""
    rules = "".join(_sheet_rule(run, e) for e, _ in columns if e is not run.last)
    last = columns[-1][0]
    shown = last is run.last and last.given != b""  # the rule of its sheet is on the page
    head = f"<th></th>{'<th>given</th>' * shown}" + "".join(f"<th>{e.n:,}</th>" for e, _ in columns)
    rows = "".join(
        f"<tr><td>{text(caption, LONGEST)}</td>"
        + (f"<td>{_tile(run, last, columns[-1][1], i, GIVEN)}</td>" if shown else "")
        + "".join(f"<td>{_tile(run, e, t, i)}</td>" for e, t in columns)
        + "</tr>"
        for i, caption in enumerate(captions)
    )
    return (
        f"<style>{rules}</style><h2>The same conditions and noise, as training went on</h2>"
        f'<div class="scroll"><table class="strip"><tr>{head}</tr>{rows}</table></div>'
    )


def beside_plain(run: Run) -> str:
    """The same noise without and with what steered it, evaluation by evaluation of `latentmill eval`."""
    parts = []
    for plain, others in steered_beside_plain([e for e in run.evaluations if e.tiles]):
        steered = [(e, e.tiles) for e in others if e.tiles]
        if plain.tiles is None or not steered:
            continue
        columns = [(plain, plain.tiles), *steered]
        shown = next(((e, t) for e, t in steered if e.given), None)
        rules = "".join(_sheet_rule(run, e) for e, _ in columns) + (_given_rule(run, shown[0]) if shown else "")
        heads = ["", *(["given"] if shown else []), "without", *(steering_of(e) for e, _ in steered)]
        rows = "".join(
            f"<tr><td>{text(steered[0][1].captions[i], LONGEST)}</td>"
            + (f"<td>{_tile(run, *shown, i, GIVEN)}</td>" if shown else "")
            + "".join(f"<td>{_tile(run, e, t, i)}</td>" for e, t in columns)
            + "</tr>"
            for i in range(min(CAPTIONS_OVER_TIME, len(steered[0][1].captions)))
        )
        head = "".join(f"<th>{text(name, LONGEST)}</th>" for name in heads)
        parts.append(
            f'<style>{rules}</style><div class="scroll"><table class="strip"><tr>{head}</tr>{rows}</table></div>'
        )
    return "".join(parts)


def steering_of(evaluation: Evaluation) -> str:
    """What images were given besides their conditioning, in words, without hashes."""
    steering = evaluation.card.get("steering") or {}
    return said({name: value for name, value in steering.items() if not name.endswith("_sha256")})


def _name(run: Run, evaluation: Evaluation) -> str:
    """CSS class of an evaluation's sheet; unique on the page, and free of characters from outside."""
    place = f"{run.url} {evaluation.name}" if evaluation.name else run.url
    return f"g{hashlib.sha256(place.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}-{evaluation.n}"


def _sheet_rule(run: Run, evaluation: Evaluation) -> str:
    return _rule(_name(run, evaluation), evaluation.grid)


def _given_rule(run: Run, evaluation: Evaluation) -> str:
    return _rule(f"{_name(run, evaluation)}{GIVEN}", evaluation.given) if evaluation.given else ""


def _rule(name: str, png: bytes) -> str:
    return f".{name}{{background-image:url(data:image/png;base64,{base64.b64encode(png).decode()})}}"


def _pair(run: Run, evaluation: Evaluation, tiles: Tiles, index: int) -> str:
    """What was given, where that is a picture, and the tile beside it."""
    drawn = _tile(run, evaluation, tiles, index)
    if not evaluation.given:
        return drawn
    return f'<span class="pair">{_tile(run, evaluation, tiles, index, GIVEN)}{drawn}</span>'


def _tile(run: Run, evaluation: Evaluation, tiles: Tiles, index: int, sheet: str = "") -> str:
    """One tile of the sheet, as an element that scales with its column; "" beyond the last. sheet: GIVEN for what was
    given.

    Percentages of background-size and -position are relative to the element, so they follow from the sheet's geometry
    in units of one tile.
    """
    if index >= len(tiles.captions):
        return ""
    width, height, gap, columns = tiles.width, tiles.height, tiles.gap, tiles.columns
    sheet_w, sheet_h = tiles.sheet
    left, top = (index % columns) * (width + gap), (index // columns) * (height + gap)
    x = 100 * left / (sheet_w - width) if sheet_w > width else 0
    y = 100 * top / (sheet_h - height) if sheet_h > height else 0
    crisp = " crisp" if width < CRISP_BELOW else ""
    size = f"{100 * sheet_w / width:.3f}% {100 * sheet_h / height:.3f}%"
    style = f"aspect-ratio:{width}/{height};background-size:{size};background-position:{x:.3f}% {y:.3f}%"
    label = text(f"{'given: ' if sheet else ''}{tiles.captions[index]}", LONGEST)
    name = f"{_name(run, evaluation)}{sheet}"
    return f'<span class="tile{crisp} {name}" role="img" aria-label="{label}" style="{style}"></span>'
