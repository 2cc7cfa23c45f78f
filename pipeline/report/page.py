"""latentmill report RUN... dest=report.html: one self-contained page about one run, or about several runs side by side.

The page loads nothing from a network, is light or dark by the reader's preference, and can be read on a phone. Its only
script sorts tables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import ConfigError
from pipeline.log import show
from pipeline.report import samples, tables
from pipeline.report.charts import Level, Series, line_chart, short
from pipeline.report.elements import document
from pipeline.report.pareto import pareto
from pipeline.report.run import Run, load, spread
from pipeline.report.tables import duration, fids_of, fids_of_all
from pipeline.storage.urls import open_storage, split_url

DEFAULT_DEST = "report.html"
SCRIPT = Path(__file__).with_name("sort.js")


def main(argv: Sequence[str]) -> int:
    """Run the verb. argv: run directories and dest=FILE. Without dest= the page of one run is written into that run."""
    urls = [argument for argument in argv if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    dest = options.pop("dest", "")
    if options or not urls:
        problem = f"{next(iter(options))}= is no option of report; " if options else ""
        raise ConfigError(f"{problem}usage: latentmill report RUN... [dest=report.html]")
    if not dest:
        dest = f"{urls[0].rstrip('/')}/{DEFAULT_DEST}" if len(urls) == 1 else DEFAULT_DEST
    write(urls, dest)
    show(f"report: {dest}")
    return 0


def write(urls: Sequence[str], dest: str, targets: Mapping[str, float] | None = None) -> None:
    """Write the page about the runs at `urls` to `dest` (a path or s3:// URL), whole or not at all.

    targets: figures to reach, shown beside those reached: attribute_accuracy (at least), fid_ratio (FID over its
    reconstruction floor, at most), seconds (of all steps, at most).
    """
    html = page([load(url) for url in urls], targets or {})
    root, key = split_url(dest)
    open_storage(root).put(key, html.encode())


def page(runs: Sequence[Run], targets: Mapping[str, float]) -> str:
    """The whole page as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _single_run(runs[0], targets) if len(runs) == 1 else _compared_runs(runs)
    footer = (
        f"<footer>latentmill {escape(pipeline.__version__)}. Latent diffusion as in Rombach et al. "
        "2021. Every number here is in the run's metrics.jsonl and evals/.</footer>"
    )
    return document(title, body + footer, f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>")


def _single_run(run: Run, targets: Mapping[str, float]) -> str:
    return "".join(
        (
            f"<h1>{escape(run.name)}</h1>{_subtitle(run)}{_headline(run, targets)}",
            samples.final(run),
            samples.over_time(run),
            _section("Quality", _quality([run])),
            _section("Guidance", _charts([pareto(run.evaluations, fid) for fid in fids_of_all(run.evaluations)])),
            _section("Evaluations", tables.evaluation_table(run.evaluations)),
            _section("Training", _training([run])),
            _section("Speed", _speed(run)),
            _section("Alerts", tables.alerts(run)),
            _section("Steps", tables.steps(run)),
            _section("Data and run", tables.facts_and_config(run)),
        )
    )


def _compared_runs(runs: Sequence[Run]) -> str:
    parts = [
        "<h1>Runs compared</h1>",
        tables.comparison(runs),
        _section("Quality", _quality(runs)),
        _section("Training", _training(runs)),
    ]
    for run in runs:
        parts += [
            f"<h2>{escape(run.name)}</h2>{_subtitle(run)}",
            samples.final(run, heading=False),
            _charts([pareto(run.evaluations, fid) for fid in fids_of_all(run.evaluations)]),
            tables.evaluation_table(run.evaluations),
        ]
        parts.append(tables.facts_and_config(run))
    return "".join(parts)


def _section(heading: str, content: str) -> str:
    return f"<h2>{escape(heading)}</h2>{content}" if content else ""


# --------------------------------------------------------------------------------------------------------------------
# Headline


def _subtitle(run: Run) -> str:
    start = run.starts[-1] if run.starts else {}
    parts = [f"{short(run.samples)} samples seen"]
    if start.get("world"):
        parts.append(f"{start['world']} ranks")
    parts.append("no restarts" if not run.restarts else f"{run.restarts} restart{'s' * (run.restarts > 1)}")
    if run.seconds > 0:
        parts.append(f"{duration(run.seconds)} of training and evaluation")
    return f'<p class="soft">{escape(" · ".join(parts))}</p>'


def _headline(run: Run, targets: Mapping[str, float]) -> str:
    """Cards with the figures of the last evaluation inside training, the training speed and the time of all steps."""
    cards: list[str] = []
    if run.last:
        metrics = run.last.metrics
        if (accuracy := metrics.get("attribute_accuracy")) is not None:
            cards.append(_accuracy_card(accuracy, metrics, targets.get("attribute_accuracy")))
        cards += [_fid_card(name, metrics, targets.get("fid_ratio")) for name in fids_of(metrics)]
        if (score := metrics.get("clip_score")) is not None:
            real = metrics.get("clip_score_real")
            notes = [f"real images {real:.1f}" if real is not None else "100 × cosine"]
            cards.append(_card("CLIP score", f"{score:.1f}", [*_error_bar_notes("clip_score", metrics), *notes]))
    rates = [rate for _, rate in run.curve("images_per_s")]
    if rates:
        cards.append(_card("training speed", f"{sorted(rates)[len(rates) // 2]:.0f}", ["images/s, median"]))
    if run.steps:
        seconds, limit = sum(step["seconds"] for step in run.steps), targets.get("seconds")
        reached = None if limit is None else (f"target ≤ {duration(limit)}", seconds <= limit)
        cards.append(_card("time of all steps", duration(seconds), [], reached))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _accuracy_card(value: float, metrics: Mapping[str, Any], target: float | None) -> str:
    notes = _error_bar_notes("attribute_accuracy", metrics)
    if (real := metrics.get("attribute_accuracy_real")) is not None:
        notes.append(f"real images {real:.3f}")
    return _card(
        "attribute accuracy",
        f"{value:.3f}",
        notes,
        None if target is None else (f"target ≥ {target:g}", value >= target),
    )


def _fid_card(name: str, metrics: Mapping[str, Any], target: float | None) -> str:
    value, floor = metrics[name], metrics.get(f"{name}_floor_reconstruction")
    notes = _error_bar_notes(name, metrics) + (
        [] if not floor else [f"autoencoder floor {short(floor)}: {value / floor:.2f}×"]
    )
    reached = None if target is None or not floor else (f"target ≤ {target:g}× floor", value <= target * floor)
    return _card(name, short(value), notes, reached)


def _error_bar_notes(name: str, metrics: Mapping[str, Any]) -> list[str]:
    """A figure's error bar in words; [] when it has none."""
    bar = spread(metrics, name)
    return [f"{short(bar[0])} to {short(bar[1])}"] if bar else []


def _card(label: str, value: str, notes: Sequence[str], target: tuple[str, bool] | None = None) -> str:
    lines = [f"<span>{escape(note)}</span>" for note in notes]
    if target:
        aim, is_met = target
        kind, outcome = ("met", "reached") if is_met else ("missed", "not reached")
        lines.append(f'<span class="{kind}">{escape(aim)}: {outcome}</span>')
    return f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b>{"".join(lines)}</div>'


# --------------------------------------------------------------------------------------------------------------------
# Charts


def _quality(runs: Sequence[Run]) -> str:
    last = next((run.last.metrics for run in runs if run.last), {})
    charts = [
        _metric_chart(
            runs, "attribute_accuracy", "Attribute accuracy", "share of captions shown right", last, y_range=(0, 1)
        )
    ]
    for name in fids_of(last):
        charts.append(_metric_chart(runs, name, name, "lower is better, log scale", last, log_y=True))
    charts.append(_metric_chart(runs, "clip_score", "CLIP score", "100 × cosine", last))
    charts.append(_by_objects(runs[0]) if len(runs) == 1 else "")
    return _charts(charts)


def _metric_chart(runs: Sequence[Run], metric: str, title: str, unit: str, last: Mapping[str, Any], **axes: Any) -> str:
    """One metric of each run over its evaluations inside training, with the metric's floors."""
    series = [
        Series(run.name, run.evaluation_curve(metric), colour=i, dots=True, bars=run.evaluation_bars(metric))
        for i, run in enumerate(runs)
    ]
    floors = {
        "real": last.get(f"{metric}_real", last.get(f"{metric}_floor_real")),
        "reconstructed": last.get(f"{metric}_reconstruction", last.get(f"{metric}_floor_reconstruction")),
    }
    levels = [Level(label, float(y)) for label, y in floors.items() if y is not None]
    if len(levels) == 2 and abs(levels[0].y - levels[1].y) <= 0.04 * abs(levels[0].y) and not axes.get("log_y"):
        levels = [Level("real and reconstructed", levels[0].y)]  # two labels would overlap
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
                if count in (evaluation.metrics.get("attribute_accuracy_by_objects") or {})
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
        ]
    )


def _by_noise(run: Run) -> str:
    """The loss by range of noise levels. The ranges' losses differ by orders of magnitude."""
    rows = [row for row in run.rows if row.get("kind") == "train" and row.get("loss_by_noise")]
    levels = sorted({level for row in rows for level in row["loss_by_noise"]})
    series = [
        Series(
            f"noise from {float(level):.0%}",
            [(float(row["n"]), float(row["loss_by_noise"][level])) for row in rows if level in row["loss_by_noise"]],
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
