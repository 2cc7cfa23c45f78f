"""A plan as one page for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.planning.plan.choices import ROOM, Choice
from pipeline.planning.plan.figures import value_words
from pipeline.planning.plan.sections import Plan, Section

HEADINGS = {
    "encode": "Cache",
    "training": "Training",
    "storage": "What the bucket holds",
    "evaluations": "Evaluations",
    "whole": "In all",
}
SHORTEST = 72
"""Characters of where a figure comes from that stand beside it; longer ones are notes below the page."""


def page(plan: Plan) -> str:
    """The whole text."""
    sources: list[str] = []
    parts = [plan.title, ""]
    for section in plan.sections:
        parts += [f"{HEADINGS[section.name]}", *_lines(section, sources)]
        if section.name == "training" and plan.choices:
            parts += ["", *_choices(plan), *_scales(plan)]
        parts += [*(f"  {note}" for note in section.notes), ""]
    if sources:
        parts += [*(f"[{number}] {source}" for number, source in enumerate(sources, 1)), ""]
    parts.append(
        "measured: by a committed benchmark, or in the source itself. calibrated: on this machine, by latentmill "
        "calibrate.\narithmetic: by formulas and stated assumptions."
    )
    return "\n".join(parts)


def _lines(section: Section, sources: list[str]) -> list[str]:
    """A line for each figure; where long texts say where they come from, they are numbered and collected."""
    rows = []
    for figure in section.figures:
        where = figure.where
        if len(where) > SHORTEST:
            if where not in sources:
                sources.append(where)
            where = f"[{sources.index(where) + 1}]"
        rows.append((figure.name, value_words(figure.value, figure.unit), figure.basis, where))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"  {name.ljust(widths[0])}   {value.rjust(widths[1])}   {basis.ljust(widths[2])}   {where}".rstrip()
        for name, value, basis, where in rows
    ]


def _choices(plan: Plan) -> list[str]:
    """A table of peaks: a row for each micro-batch, a column for each stage."""
    stages = sorted({one.stage for one in plan.choices})
    by_place = {(one.micro_batch, one.stage): one for one in plan.choices}
    rows = [["micro-batch", *(f"ZeRO {stage}" for stage in stages)]]
    for micro in sorted({one.micro_batch for one in plan.choices}):
        rows.append([str(micro), *(_cell(by_place.get((micro, stage)), plan) for stage in stages)])
    marks = f"peak of a rank in GB; x: more than {ROOM:.0%} of a GPU, *: these figures, >: recommended"
    return [f"  Memory ({marks})", *_aligned(rows), f"  {plan.why}"]


def _scales(plan: Plan) -> list[str]:
    """A table of the same run on other numbers of nodes; [] where there are none."""
    if len(plan.scales) < 2:
        return []
    rows = [["nodes", "GPUs", "images/s", "hours of steps", "device-hours", "sending"]]
    for one in plan.scales:
        numbers = (value_words(value, "") for value in (one.images_per_s, one.hours, one.device_hours))
        mark = "x" if one.fits is False else ""
        rows.append([f"{mark}{one.nodes}", str(one.ranks), *numbers, f"{one.sent:.0%}"])
    what = "The same batch on other numbers of nodes"
    if any(one.fits is False for one in plan.scales):
        what += f" (x: a step takes more than {ROOM:.0%} of a GPU)"
    return ["", f"  {what}", *_aligned(rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "   ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _cell(one: Choice | None, plan: Plan) -> str:
    if one is None:
        return "-"
    places = (one.stage, one.micro_batch)
    chosen = plan.chosen is not None and places == (plan.chosen.stage, plan.chosen.micro_batch)
    best = plan.recommended is not None and places == (plan.recommended.stage, plan.recommended.micro_batch)
    marks = ("x" if one.fits is False else "") + ("*" if chosen else "") + (">" if best else "")
    return f"{marks}{one.peak / 1e9:.3g}"
