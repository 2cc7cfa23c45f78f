"""What pages tell of autoencoders alone: the parts of a run's loss, and the page of `latentmill reconstruct`, with the
figures of an autoencoder that is of no run, and its worst pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pipeline
from pipeline.config.tasks.found import present
from pipeline.errors import RunError
from pipeline.parsing.redaction import redact
from pipeline.report import samples, tables
from pipeline.report.charts import Series, line_chart
from pipeline.report.elements import cell, document, prose, table, text
from pipeline.report.headline import headline
from pipeline.report.parsed import is_number
from pipeline.report.publish import put_page
from pipeline.report.run import Run, evaluation_at
from pipeline.storage.urls import open_storage

PAGE = "report.html"
MARK = "Every number here is in metrics.json beside this page."
"""A sentence that every such page has."""
UNITS = {"latent_mean": "before scaling", "latent_std": "before scaling", "posterior_std": "before scaling"}
"""Numbers about latents, and what they are counted in."""
PARTIAL = ("pairs.png", "given.png", "grid.png", "grid.json")
"""What an evaluation that was interrupted may have left."""

PARTS = (
    ("rec", "Reconstruction error", "log scale", True),
    ("perceptual", "Perceptual distance of the loss", "", False),
    ("kl", "KL", "nats for each pixel value; it rises where its weight is small", False),
    ("quantisation", "Distance of latents to their codes", "mean square, log scale", True),
    ("codes_used", "Codes used in training", "share of the codebook", False),
    ("perplexity", "Perplexity in training", "codes, were they used evenly", False),
    ("lambda", "Weight of the discriminator", "the ratio of gradients, log scale", True),
    ("gan", "Generator's loss", "minus the logit of reconstructions", False),
    ("discriminator", "Discriminator's loss", "hinge: 2 where it sees no difference", False),
    ("grad_norm_discriminator", "Gradient norm of the discriminator", "before clipping, log scale", True),
)
"""Name in metrics.jsonl, title, unit, and whether the axis is logarithmic."""
LOGITS = (("logits_real", "pictures"), ("logits_fake", "reconstructions"))


def loss_parts(runs: Sequence[Run]) -> list[str]:
    """The charts of the parts that any of the runs logs; [] for runs of diffusion models."""
    charts = []
    for name, title, unit, log_y in PARTS:
        series = [Series(run.name, run.curve(name), colour=i, smooth=True) for i, run in enumerate(runs)]
        charts.append(line_chart(series, title=title, y_label=unit, log_y=log_y))
    if len(runs) == 1:
        logits = [Series(label, runs[0].curve(name), colour=i, smooth=True) for i, (name, label) in enumerate(LOGITS)]
        charts.append(line_chart(logits, title="Logits of the discriminator"))
    return [chart for chart in charts if chart]


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
            f"<h2>Figures</h2>{_figures(evaluation.metrics)}",
            _latents(evaluation.metrics),
            f"<footer>latentmill {text(pipeline.__version__)}. First stages as in Rombach et al. 2021. {MARK}</footer>",
        )
    )
    put_page(f"{url.rstrip('/')}/{PAGE}", document(name, body), MARK)


def _figures(metrics: Mapping[str, Any]) -> str:
    """A row for each figure: its value, error, and unit."""
    lines = [(name, name, "lower is better", 3) for name in tables.fids_of(metrics)]
    for name in tables.fids_of(metrics):
        lines += [(f"{name}_floor_real", f"{name} of as many real images", "", 3)]
    lines += [(name, tables.heading(name, figure), figure.unit, figure.digits) for name, figure in present(metrics)]
    lines += [(name, name.replace("_", " "), unit, 4) for name, unit in UNITS.items()]
    rows = []
    for name, title, unit, digits in lines:
        if is_number(value := metrics.get(name)):
            error = metrics.get(f"{name}_error")
            shown = f"{value:.{digits}f}", f"± {error:.2g}" if is_number(error) else ""
            rows.append(f"<tr>{''.join(map(cell, (title, *shown)))}{prose(unit)}</tr>")
    return table(("figure", "value", "error", ""), rows)


def _latents(metrics: Mapping[str, Any]) -> str:
    """Mean and standard deviation of each channel of the latents, and the scale that makes the deviation of all 1."""
    means, deviations = (metrics.get(f"latent_{name}_by_channel") or {} for name in ("mean", "std"))
    whole = metrics.get("latent_std")
    if not means or not is_number(whole) or not whole:
        return ""
    rows = []
    for channel in means:
        numbers = (values.get(channel) for values in (means, deviations))
        cells = [f"{number:.4f}" if is_number(number) else "–" for number in numbers]
        rows.append(f"<tr>{''.join(map(cell, (channel, *cells)))}</tr>")
    said = f"Latents before scaling, by channel. A scale of {1 / whole:.4g} makes the deviation of all of them 1."
    return f'<h2>Latents</h2><p>{said}</p><div class="beside">{table(("channel", "mean", "deviation"), rows)}</div>'
