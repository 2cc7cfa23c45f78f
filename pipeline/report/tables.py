"""The tables of a run's report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config.tasks.figures import Figure
from pipeline.config.tasks.found import present
from pipeline.planning.happened import compared
from pipeline.report.charts import short
from pipeline.report.elements import text
from pipeline.report.parsed import is_number, said
from pipeline.report.run import Evaluation, Run, spread

NAMES = ("run", "tracking.group", "launch.processes", "launch.threads", "device")
"""Keys of the configuration that may differ between runs without changing their results."""
NO_FID = re.compile(r"_floor|_(low|high|error)$")
"""Ends of metric names that belong to a FID but are no FID."""
BOUNDS = {"reconstruction": "of reconstructions", "baseline": "of a trivial method", "permuted": "permuted"}
"""Headings of what a task's figure lies between."""
MOST_FIDS = 12
"""FIDs of different features that a page shows."""
LONG, FILE = 4000, 1 << 20
"""Characters of a sentence, and of a whole file, that are shown."""


def evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    """Every evaluation's figures with their floors, and below the table how each evaluation was made."""
    if not evaluations:
        return ""
    fids = fids_of_all(evaluations)
    differing = {name: measure for name, measure in MEASURES.items() if len(set(map(measure, evaluations))) > 1}
    columns: list[tuple[str, Any]] = [
        ("samples seen", lambda e: Sorted(f"{e.n:,}", e.n)),
        ("evaluation", lambda e: e.name or "in training"),
        ("images", lambda e: e.metrics.get("images")),
        ("sampler", lambda e: e.card.get("sampler")),
        ("steps", lambda e: e.card.get("steps")),
        ("guidance", lambda e: e.metrics.get("guidance")),
        *differing.items(),
    ]
    for name, figure in figures_of_all(evaluations):
        columns.append((heading(name, figure), partial(_figure, name, figure)))
        columns += [
            (BOUNDS[ending], partial(_bound, f"{name}_{ending}", figure))
            for ending in BOUNDS
            if any(e.metrics.get(f"{name}_{ending}") is not None for e in evaluations)
        ]
    for name in fids:
        columns += [
            (
                name,
                lambda e, name=name: _short(e.metrics.get(name)) + _half_width(e, name, 2),
            ),
            ("real floor", lambda e, name=name: _short(e.metrics.get(f"{name}_floor_real"))),
            (
                "reconstruction floor",
                lambda e, name=name: _short(e.metrics.get(f"{name}_floor_reconstruction")),
            ),
        ]
    columns += [
        ("latent std", lambda e: _short(e.metrics.get("latent_std")) + _half_width(e, "latent_std", 3)),
        ("seconds", lambda e: _fixed(e.metrics.get("seconds"), 1)),
    ]
    columns = [column for column in columns if any(column[1](e) not in (None, "") for e in evaluations)]
    table = _table([heading for heading, _ in columns], [[value(e) for _, value in columns] for e in evaluations])
    cards = [e.card["line"] for e in evaluations if e.card.get("line")]
    card_lines = "".join(f"<p>{text(line, LONG)}</p>" for line in cards)
    return table + (f"<details><summary>How each was measured</summary>{card_lines}</details>" if cards else "")


def comparison(runs: Sequence[Run]) -> str:
    """A row for each run, with the settings that differ between the runs."""
    configs = [_flat(run.settings) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if key not in NAMES and len({json.dumps(config.get(key)) for config in configs}) > 1
    ]
    lasts = [run.last for run in runs if run.last]
    fid, figures = next(iter(fids_of_all(lasts)), ""), figures_of_all(lasts)
    rows = []
    for run, config in zip(runs, configs, strict=True):
        metrics = run.last.metrics if run.last else {}
        losses = [loss for _, loss in run.curve("loss")]
        tail = losses[-max(len(losses) // 10, 1) :]
        rates = sorted(rate for _, rate in run.curve("images_per_s"))
        rows.append(
            [
                run.name,
                *(_setting(config.get(key)) for key in differing),
                Sorted(f"{run.samples:,}", run.samples),
                _fixed(sum(tail) / len(tail), 4) if tail else "",
                *(_fixed(metrics.get(name), figure.digits) for name, figure in figures),
                Sorted(_short(metrics.get(fid)), metrics.get(fid)),
                f"{rates[len(rates) // 2]:.0f}" if rates else "",
                Sorted(duration(run.seconds), run.seconds),
                run.restarts,
            ]
        )
    headings = [
        "run",
        *differing,
        "samples seen",
        "loss, last tenth",
        *(heading(name, figure) for name, figure in figures),
        fid or "FID",
        "images/s",
        "time",
        "restarts",
    ]
    return f'<div style="margin-top:24px">{_table(headings, rows)}</div>'


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """dotted key -> value of a configuration."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        settings |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return settings


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def alerts(run: Run) -> str:
    """The run's alerts: spikes and stalls."""
    rows = [
        [Sorted(f"{row['n']:,}", row["n"]), row.get("alert", ""), row.get("text", "")]
        for row in run.rows
        if row.get("kind") == "alert"
    ]
    return _table(["at samples seen", "alert", "what"], rows, prose=["what"]) if rows else ""


def starts(run: Run) -> str:
    """When the run was begun and resumed; "" for a run without restarts."""
    if run.restarts == 0:
        return ""
    rows = [[Sorted(f"{row['n']:,}", row["n"]), row.get("world", ""), row.get("engine", "")] for row in run.starts]
    return f"<h3>Starts and restarts</h3>{_table(['at samples seen', 'ranks', 'engine'], rows)}"


def commits(run: Run) -> str:
    """A line about the cost of commits; "" when the rows do not hold it."""
    rows = [row for row in run.rows if row.get("kind") == "checkpoint" and row.get("write_s")]
    if not rows:
        return ""
    stall = sum(row.get("stall_s") or 0.0 for row in rows)
    share = f" ({stall / run.seconds:.2%} of the run)" if run.seconds > 0 else ""
    size, slowest = max(row.get("bytes") or 0 for row in rows), max(row["write_s"] for row in rows)
    return (
        f"<p>{len(rows)} commits, {size / 1e6:,.0f} MB each of rank 0: training waited {stall:.2f} s for them in "
        f"all{share}; the slowest was there {slowest:.1f} s after it began.</p>"
    )


def steps(run: Run) -> str:
    """Commands around the training and their times, which the demo keeps; "" for other runs."""
    rows = [[step.heading, duration(step.seconds), step.command] for step in run.steps]
    if not rows:
        return ""
    total = duration(sum(step.seconds for step in run.steps))
    return _table(["step", "time", "command"], [*rows, ["all steps", total, " "]], prose=["command"], sortable=False)


def planned(run: Run) -> str:
    """What was planned for the run beside what happened; "" without a plan."""
    rows = compared(run)
    headings = ["figure", "planned", "basis", "happened", "happened / planned"]
    return _table(headings, rows, prose=["figure", "basis"], sortable=False) if rows else ""


def facts_and_config(run: Run) -> str:
    """The run's own record (run.json: datasets, contract) and its resolved configuration, folded."""
    facts = json.dumps(run.facts, indent=2, ensure_ascii=False, sort_keys=True) if run.facts else ""
    return "".join(
        f"<details><summary>{heading}</summary><pre>{text(content.strip(), FILE)}</pre></details>"
        for heading, content in (("Datasets and contract", facts), ("Resolved configuration", run.config))
        if content
    )


def left_out(notes: Iterable[str]) -> str:
    """What the page lacks, where it can be seen."""
    return "".join(f'<p style="color:var(--bad)">{text(note, LONG)}</p>' for note in notes)


# --------------------------------------------------------------------------------------------------------------------
# What figures were measured against


def _reference(evaluation: Evaluation) -> str:
    return _digest(evaluation.card.get("reference"), "sha256")


def _captions(evaluation: Evaluation) -> str:
    return _digest(evaluation.card.get("captions"), "dataset")


def _images(evaluation: Evaluation) -> str:
    return str(evaluation.metrics.get("images") or "")


def _pictures(evaluation: Evaluation) -> str:
    return _digest(evaluation.card.get("pictures"), "dataset")


def _perceptual(evaluation: Evaluation) -> str:
    card = evaluation.card
    return _digest(card.get("judge"), "perceptual_sha256") or _digest(card.get("perceptual"), "sha256")


def _steering(evaluation: Evaluation) -> str:
    steering = evaluation.card.get("steering")
    return said(steering) if isinstance(steering, Mapping) else ""


MEASURES = {
    "reference": _reference,
    "captions of": _captions,
    "pictures of": _pictures,
    "perceptual weights": _perceptual,
    "steering": _steering,
}
"""What tells evaluations apart that share a sampler and its settings: heading -> its value, "" for none."""


def not_comparable(evaluations: Sequence[Evaluation], what: str, of_runs: bool = False) -> list[str]:
    """A sentence for each measure that differs between the evaluations. what: they, in words. of_runs: FID depends on
    the number of images too, which a run's last evaluation may raise."""
    sentences = []
    for heading, measure in (MEASURES | ({"number of images": _images} if of_runs else {})).items():
        places: dict[str, list[int]] = {}
        for evaluation in evaluations:
            if value := measure(evaluation):
                places.setdefault(value, []).append(evaluation.n)
        if len(places) > 1:
            groups = [f"{value} at {n[0]:,}{' and more' * (len(n) > 1)}" for value, n in places.items()]
            name = heading.removesuffix(" of")
            sentences.append(f"{what} differ in their {name} ({'; '.join(groups[:6])}), so figures do not compare.")
    return sentences


def _digest(facts: Any, name: str) -> str:
    """The beginning of a digest on a card; "" for none."""
    value = facts.get(name) if isinstance(facts, Mapping) else None
    return value[:12] if isinstance(value, str) else ""


# --------------------------------------------------------------------------------------------------------------------
# Cells


@dataclass(frozen=True)
class Sorted:
    """A cell that shows `text` and is sorted by `by`."""

    text: str
    by: float | None


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[Any]], prose: Sequence[str] = (), sortable: bool = True
) -> str:
    """A table that scrolls on its own when the page is too narrow. prose: headings of columns whose text may wrap.
    sortable: whether a click on a heading sorts it."""
    kinds = [' class="text"' if heading in prose else "" for heading in headings]
    heading_cells = [
        f'<button type="button">{text(heading)}</button>' if sortable else text(heading) for heading in headings
    ]
    header_cells = [f'<th scope="col"{kind}>{heading}</th>' for heading, kind in zip(heading_cells, kinds, strict=True)]
    body = "".join(f"<tr>{''.join(map(_cell, row, kinds))}</tr>" for row in rows)
    head = f"<thead><tr>{''.join(header_cells)}</tr></thead>"
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _cell(value: Any, kind: str) -> str:
    by = ""
    if isinstance(value, Sorted):
        by, value = f' data-v="{value.by}"' if is_number(value.by) else "", value.text
    return f"<td{kind}{by}>{text('–' if value in (None, '') else str(value), LONG)}</td>"


def _figure(name: str, figure: Figure, evaluation: Evaluation) -> str:
    """A figure of an evaluation with half the width of its error bar."""
    return _fixed(evaluation.metrics.get(name), figure.digits) + _half_width(evaluation, name, figure.digits)


def _bound(name: str, figure: Figure, evaluation: Evaluation) -> str:
    return _fixed(evaluation.metrics.get(name), figure.digits)


def _half_width(evaluation: Evaluation, name: str, digits: int) -> str:
    """Plus-minus and half the width of a figure's error bar; "" when it has none."""
    bar = spread(evaluation.metrics, name)
    return f" ± {(bar[1] - bar[0]) / 2:.{digits}f}" if bar else ""


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "" if value is None else short(value)


def heading(name: str, figure: Figure) -> str:
    """A figure's title, and whether it is against reconstructions."""
    title = figure.title if figure.title[:2].isupper() else figure.title[0].lower() + figure.title[1:]
    return f"{title}, to the reconstruction" if name != figure.name else title


def figures_of_all(evaluations: Sequence[Evaluation]) -> list[tuple[str, Figure]]:
    """The figures that any of the evaluations has, with their names there, in the order of the table of tasks."""
    return present({name: value for e in evaluations for name, value in e.metrics.items() if value is not None})


def fids_of(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the FIDs among metrics: fid_democlip, rfid_democlip and their like, without their floors."""
    names = [name for name in metrics if name.startswith(("fid_", "rfid_")) and not NO_FID.search(name)]
    return [name for name in names if is_number(metrics[name])]


def fids_of_all(evaluations: Sequence[Evaluation]) -> list[str]:
    """Names of the FIDs among all of them."""
    return list(dict.fromkeys(name for evaluation in evaluations for name in fids_of(evaluation.metrics)))[:MOST_FIDS]


def duration(seconds: float) -> str:
    """42 s, 7 min 30 s, 3 h 05 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
