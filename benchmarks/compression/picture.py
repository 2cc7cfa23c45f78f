"""A chart of a report as an SVG file of its own, with its title, legend and colours: pages of docs/ show it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.report.charts import HEIGHT, LEFT, SERIES_COLOURS, WIDTH, Series, line_chart
from pipeline.report.elements import text

COLOURS = ("#3a6ea5", "#c06a35", "#4b8a5c", "#8557a5", "#b3475f", "#4f7f8c")
HEAD, ROW = 34, 20
"""Pixels above the chart, and of a row of the legend."""
ACROSS = 2
"""Entries of the legend in a row."""
STYLE = (
    "text{fill:#5a646c;font:12px system-ui,sans-serif}text.title{fill:#22272e;font-size:14px;font-weight:600}"
    ".rule{stroke:#e6e6e2}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.hit{fill:none}"
    "line.level{stroke:#667078;stroke-dasharray:4 4}text.level{font-size:11px}.bar-ends{fill:none;stroke-width:1.2}"
)


def picture(series: Sequence[Series], *, title: str, **settings: object) -> str:
    """An SVG document with the chart that `line_chart` draws of the same arguments; "" where it draws none."""
    figure = line_chart(series, title=title, **settings)  # type: ignore[arg-type]
    found = re.search(r"<svg [^>]*>(.*)</svg>", figure, re.DOTALL)
    if found is None:
        return ""
    rows = -(-len(series) // ACROSS) if len(series) > 1 else 0
    height = HEAD + HEIGHT + 8 + ROW * rows
    colours = "".join(f".s{i}{{stroke:{one}}}.dot.s{i}{{fill:{one}}}" for i, one in enumerate(COLOURS))
    unit = f" ({settings['y_label']})" if settings.get("y_label") else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{text(title)}">',
        f"<style>{STYLE}{colours}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="12" y="21">{text(title + unit)}</text>',
        f'<g transform="translate(0 {HEAD})">{found[1]}</g>',
    ]
    for i, one in enumerate(series if rows else ()):
        x = LEFT + (i % ACROSS) * (WIDTH - LEFT) // ACROSS
        y = HEAD + HEIGHT + 16 + ROW * (i // ACROSS)
        colour = COLOURS[one.colour % SERIES_COLOURS]
        parts.append(f'<line x1="{x}" x2="{x + 14}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{text(one.label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
