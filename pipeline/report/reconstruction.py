"""The page of `latentmill reconstruct`: the figures of an autoencoder that is of no run, and its worst pairs."""

from __future__ import annotations

import pipeline
from pipeline.errors import RunError
from pipeline.parsing.redaction import redact
from pipeline.report import samples, tables
from pipeline.report.elements import document, text
from pipeline.report.headline import headline
from pipeline.report.publish import put_page
from pipeline.report.run import Run, evaluation_at
from pipeline.storage.urls import open_storage

PAGE = "report.html"
MARK = "Every number here is in metrics.json beside this page."
"""A sentence that every such page has."""
PARTIAL = ("pairs.png", "given.png", "grid.png", "grid.json")
"""What an evaluation that was interrupted may have left."""


def write(url: str) -> None:
    """Write the page about the evaluation in the folder or at the URL, into it. Raises RunError where there is none,
    DestinationExists where its place holds anything but such a page."""
    notes: list[str] = []
    evaluation = evaluation_at(open_storage(url), notes)
    if evaluation is None:
        raise RunError(f"no evaluation of an autoencoder at {url}{f' ({notes[0]})' if notes else ''}")
    name = redact(url.rstrip("/").rsplit("/", 1)[-1])
    run = Run(url, name, [], [evaluation], "", {}, [], notes)
    body = "".join(
        (
            f"<h1>{text(name)}</h1>",
            f'<p class="soft">{text(evaluation.card.get("line", ""), tables.LONG)}</p>',
            tables.left_out(notes),
            headline(run, {}),
            samples.final(run),
            f"<h2>Figures</h2>{tables.evaluation_table([evaluation])}",
            f"<footer>latentmill {text(pipeline.__version__)}. First stages as in Rombach et al. 2021. {MARK}</footer>",
        )
    )
    put_page(f"{url.rstrip('/')}/{PAGE}", document(name, body), MARK)
