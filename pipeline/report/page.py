"""latentmill report RUN... dest=report.html: one self-contained page about one run, or about several runs side by side.

The page loads nothing from a network, is light or dark by the reader's preference, and can be read on a phone. Its only
script sorts tables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config.loading.paths import split_words, without_litter
from pipeline.config.tasks.figures import CLIP_SCORE, Figure
from pipeline.config.tasks.found import present
from pipeline.errors import ConfigError, LatentmillError, RunError
from pipeline.log import log, show
from pipeline.report import samples, tables
from pipeline.report.charts import Level, Series, line_chart
from pipeline.report.elements import document, text
from pipeline.report.headline import headline, subtitle
from pipeline.report.pareto import pareto
from pipeline.report.publish import put_page, require_page
from pipeline.report.reconstruction import loss_parts
from pipeline.report.run import Run, load
from pipeline.report.tables import fids_of, fids_of_all

DEFAULT_DEST = "report.html"
SCRIPT = Path(__file__).with_name("sort.js")
MARK = "Every number here is in the run's metrics.jsonl and evals/."
"""A sentence that every report of a run has."""
MOST_WARNINGS = 5
"""Notes about one run that are told on stderr; its page has them all."""


def main(argv: Sequence[str]) -> int:
    """Run the verb. argv: run directories and dest=FILE. Without dest= the page of one run is written into that run.

    A run that cannot be read is passed over, with a line on stderr and one on the page. Raises ConfigError, RunError
    where none can be read, DestinationExists, StorageError."""
    words, options = split_words(argv, ("dest",), "report")
    if not words:
        raise ConfigError("usage: latentmill report RUN... [dest=report.html]")
    urls, litter = without_litter(words)
    for path in litter:
        log.info(f"report: {path} is what a sweep leaves beside its runs, and none of them")
    dest = options.get("dest", "")
    if not dest:
        dest = f"{urls[0].rstrip('/')}/{DEFAULT_DEST}" if len(urls) == 1 else DEFAULT_DEST
    write(urls, dest)
    show(f"report: {dest}")
    return 0


def write(urls: Sequence[str], dest: str, targets: Mapping[str, float] | None = None) -> None:
    """Write the page about the runs at `urls` to `dest` (a path or URL in a bucket), whole or not at all.

    targets: figures to reach, shown beside those reached: a task's figures by name, fid_ratio (FID over its
    reconstruction floor, at most), seconds (of all steps, at most). Raises RunError where no run can be read,
    DestinationExists where `dest` holds anything but a report.
    """
    require_page(dest, MARK)
    runs, passed_over = list[Run](), list[str]()
    for url in urls:
        try:
            runs.append(load(url))
        except LatentmillError as error:
            if len(urls) == 1:
                raise
            passed_over.append(f"{url} is passed over: {error}")
            log.warning(f"report: {passed_over[-1]}")
    if not runs:
        raise RunError(f"none of the {len(urls)} is a run that can be read; the first: {passed_over[0]}")
    for run in runs:
        for note in run.notes[:MOST_WARNINGS]:
            log.warning(f"report: {run.url}: {note}")
        if (more := len(run.notes) - MOST_WARNINGS) > 0:
            log.warning(f"report: {run.url}: {more} more files or lines are left out; the page names them")
    put_page(dest, page(runs, targets or {}, passed_over), MARK)


def page(runs: Sequence[Run], targets: Mapping[str, float], passed_over: Sequence[str] = ()) -> str:
    """The whole page as HTML. passed_over: a sentence for each run that could not be read."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _single_run(runs[0], targets) if len(runs) == 1 else _compared_runs(runs)
    body = tables.left_out(passed_over) + body
    footer = (
        f"<footer>latentmill {text(pipeline.__version__)}. Latent diffusion as in Rombach et al. 2021. {MARK}</footer>"
    )
    return document(title, body + footer, f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>")


def _single_run(run: Run, targets: Mapping[str, float]) -> str:
    return "".join(
        (
            f"<h1>{text(run.name)}</h1>{subtitle(run)}{_notes(run)}{headline(run, targets)}",
            samples.final(run),
            samples.over_time(run),
            _section("The same noise without and with guides", samples.beside_plain(run)),
            _section("Quality", _quality([run])),
            _section("Guidance", _charts([pareto(run.evaluations, fid) for fid in fids_of_all(run.evaluations)])),
            _section("Evaluations", tables.evaluation_table(run.evaluations)),
            _section("Training", _training([run])),
            _section("Speed", _speed(run)),
            _section("Alerts", tables.alerts(run)),
            _section("Steps", tables.steps(run)),
            _section("Planned, and what happened", tables.planned(run)),
            _section("Data and run", tables.facts_and_config(run)),
        )
    )


def _compared_runs(runs: Sequence[Run]) -> str:
    parts = [
        "<h1>Runs compared</h1>",
        tables.comparison(runs),
        tables.left_out(tables.not_comparable([r.last for r in runs if r.last], "The runs' last evaluations", True)),
        _section("Quality", _quality(runs)),
        _section("Training", _training(runs)),
    ]
    for run in runs:
        parts += [
            f"<h2>{text(run.name)}</h2>{subtitle(run)}{_notes(run)}",
            samples.final(run, heading=False),
            _charts([pareto(run.evaluations, fid) for fid in fids_of_all(run.evaluations)]),
            tables.evaluation_table(run.evaluations),
        ]
        parts.append(tables.facts_and_config(run))
    return "".join(parts)


def _notes(run: Run) -> str:
    """What the run's part of the page lacks, and whether its figures compare."""
    return tables.left_out(
        [*run.notes, *tables.not_comparable(run.training_evaluations, "The evaluations inside training")]
    )


def _section(heading: str, content: str) -> str:
    return f"<h2>{text(heading)}</h2>{content}" if content else ""


# --------------------------------------------------------------------------------------------------------------------
# Charts


def _quality(runs: Sequence[Run]) -> str:
    last: dict[str, Any] = {}
    for run in reversed([run for run in runs if run.last]):  # floors and bounds of the first run that has them
        last |= run.last.metrics if run.last else {}
    drawn = [(name, figure) for name, figure in present(_all_metrics(runs)) if figure.kind != "cost"]
    of_figures = [(f, _figure_chart(runs, name, f, last)) for name, f in drawn]
    charts = [chart for figure, chart in of_figures if figure is not CLIP_SCORE]
    for name in fids_of(last):
        charts.append(_metric_chart(runs, name, name, "lower is better, log scale", last, log_y=True))
    charts += [chart for figure, chart in of_figures if figure is CLIP_SCORE]
    charts.append(_by_objects(runs[0]) if len(runs) == 1 else "")
    return _charts(charts)


def _all_metrics(runs: Sequence[Run]) -> dict[str, Any]:
    """Names that the runs' evaluations inside training have, each with one of its values."""
    evaluations = [evaluation for run in runs for evaluation in run.training_evaluations]
    return {name: value for e in evaluations for name, value in e.metrics.items() if value is not None}


def _figure_chart(runs: Sequence[Run], name: str, figure: Figure, last: Mapping[str, Any]) -> str:
    axes = {"y_range": (0, 1)} if figure.kind == "share" else {}
    title = tables.heading(name, figure)
    return _metric_chart(runs, name, title[0].upper() + title[1:], figure.unit, last, **axes)


def _metric_chart(runs: Sequence[Run], metric: str, title: str, unit: str, last: Mapping[str, Any], **axes: Any) -> str:
    """One metric of each run over its evaluations inside training, with the metric's floors."""
    series = [
        Series(run.name, run.evaluation_curve(metric), colour=i, dots=True, bars=run.evaluation_bars(metric))
        for i, run in enumerate(runs)
    ]
    floors = {
        "real": last.get(f"{metric}_real", last.get(f"{metric}_floor_real")),
        "reconstructed": last.get(f"{metric}_reconstruction", last.get(f"{metric}_floor_reconstruction")),
        "trivial method": last.get(f"{metric}_baseline"),
        "permuted": last.get(f"{metric}_permuted"),
    }
    levels = [Level(label, float(y)) for label, y in floors.items() if y is not None]
    first = levels[:2]
    same = len(first) == 2 and abs(first[0].y - first[1].y) <= 0.04 * abs(first[0].y) and not axes.get("log_y")
    if same and {level.label for level in first} == {"real", "reconstructed"}:
        levels = [Level("real and reconstructed", first[0].y), *levels[2:]]  # two labels would overlap
    return line_chart(series, title=title, y_label=unit, levels=levels, **axes)


def _by_objects(run: Run) -> str:
    counts = sorted(
        {
            key
            for evaluation in run.training_evaluations
            for key in evaluation.metrics.get("attribute_accuracy_by_objects") or {}
        }
    )
    series = [
        Series(
            f"{count} object{'s' * (count != '1')}",
            [
                (float(evaluation.n), float(evaluation.metrics["attribute_accuracy_by_objects"][count]))
                for evaluation in run.training_evaluations
                if (evaluation.metrics.get("attribute_accuracy_by_objects") or {}).get(count) is not None
            ],
            colour=i,
            dots=True,
        )
        for i, count in enumerate(counts)
    ]
    return line_chart(series, title="Attribute accuracy by number of objects", y_range=(0, 1))


def _training(runs: Sequence[Run]) -> str:
    def chart(metric: str, title: str, unit: str = "", **axes: Any) -> str:
        series = [
            Series(run.name, run.curve(metric), colour=i, smooth=axes.pop("smooth", False))
            for i, run in enumerate(runs)
        ]
        return line_chart(series, title=title, y_label=unit, **axes)

    loss = [Series(run.name, run.curve("loss"), colour=i, smooth=True) for i, run in enumerate(runs)]
    held_out = [Series(run.name, run.curve("loss", "val"), colour=i, dots=True) for i, run in enumerate(runs)]
    norm = [Series(run.name, run.curve("grad_norm"), colour=i, smooth=True) for i, run in enumerate(runs)]
    return _charts(
        [
            line_chart(loss, title="Loss", y_label="log scale", log_y=True),
            line_chart(held_out, title="Validation loss", y_label="held-out records, the same noise each time")
            if any(series.points for series in held_out)
            else "",
            line_chart(norm, title="Gradient norm", y_label="before clipping, log scale", log_y=True),
            chart("weight_norm", "Weight norm"),
            chart("lr", "Learning rate"),
            _by_noise(runs[0]) if len(runs) == 1 else "",
            *loss_parts(runs),
        ]
    )


def _by_noise(run: Run) -> str:
    """The loss by range of noise levels. The ranges' losses differ by orders of magnitude."""
    rows = [row for row in run.rows if row.get("kind") == "train" and row.get("loss_by_noise")]
    levels = sorted({level for row in rows for level in row["loss_by_noise"]})
    series = [
        Series(
            f"noise from {float(level):.0%}",
            [(float(row["n"]), float(v)) for row in rows if (v := row["loss_by_noise"].get(level)) is not None],
            colour=i,
            smooth=True,
        )
        for i, level in enumerate(levels)
    ]
    return line_chart(series, title="Loss by noise level", y_label="log scale; 0% is the least noise", log_y=True)


def _speed(run: Run) -> str:
    waits = {
        row["n"]: row["data_wait_s"]
        for row in run.rows
        if row.get("kind") == "train" and row.get("data_wait_s") is not None
    }
    steps = run.curve("step_s")
    share = [(n, 100 * waits[int(n)] / seconds) for n, seconds in steps if int(n) in waits and seconds > 0]
    charts = _charts(
        [
            line_chart(
                [Series("images/s", run.curve("images_per_s"), smooth=True)], title="Throughput", y_label="images/s"
            ),
            line_chart([Series("step", step_times(run), smooth=True)], title="Time of each step", y_label="seconds"),
            line_chart([Series("wait", share, colour=1, smooth=True)], title="Waiting for data", y_label="% of a step"),
            line_chart([Series("TFLOP/s", run.curve("tflops"), smooth=True)], title="Arithmetic", y_label=_unit(run)),
            line_chart(
                [Series("memory", run.curve("memory_gb"), colour=1)], title="Memory", y_label="GB, highest so far"
            ),
        ]
    )
    return charts + tables.commits(run) + tables.starts(run)


def _unit(run: Run) -> str:
    """The unit of the chart of arithmetic, with the last share of the device's peak where it is known."""
    used = run.curve("mfu")
    return "model TFLOP/s of a device" + (f"; {used[-1][1]:.0%} of its peak" if used else "")


def step_times(run: Run) -> list[tuple[float, float]]:
    """(samples seen, seconds) of every step, from the rows' lists of step times or, without these, from their means."""
    points: list[tuple[float, float]] = []
    previous_n = 0
    for row in (row for row in run.rows if row.get("kind") == "train"):
        step_seconds = row.get("steps_s") or ([row["step_s"]] if row.get("step_s") is not None else [])
        points += [
            (previous_n + (row["n"] - previous_n) * (i + 1) / len(step_seconds), float(seconds))
            for i, seconds in enumerate(step_seconds)
        ]
        previous_n = row["n"]
    return points


def _charts(charts: Sequence[str]) -> str:
    content = "".join(charts)
    return f'<div class="charts">{content}</div>' if content else ""


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["report", *sys.argv[1:]]))
