"""The tables of a run's report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report.charts import short
from pipeline.report.run import Evaluation, Run


def evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    """Every evaluation's figures with their floors, and below it how each was measured."""
    if not evaluations:
        return ""
    fids = dict.fromkeys(name for e in evaluations for name in fids_of(e.metrics))
    columns: list[tuple[str, Any]] = [
        ("samples seen", lambda e: f"{e.n:,}"),
        ("evaluation", lambda e: e.name or "in training"),
        ("images", lambda e: e.metrics.get("images")),
        ("guidance", lambda e: e.metrics.get("guidance")),
        ("attribute accuracy", lambda e: _fixed(e.metrics.get("attribute_accuracy"), 3)),
        ("CLIP score", lambda e: _fixed(e.metrics.get("clip_score"), 2)),
    ]
    for name in fids:
        columns += [
            (name, lambda e, name=name: _short(e.metrics.get(name))),
            ("real floor", lambda e, name=name: _short(e.metrics.get(f"{name}_floor_real"))),
            ("reconstruction floor", lambda e, name=name: _short(e.metrics.get(f"{name}_floor_reconstruction"))),
        ]
    columns.append(("seconds", lambda e: _fixed(e.metrics.get("seconds"), 1)))
    columns = [column for column in columns if any(column[1](e) not in (None, "") for e in evaluations)]
    table = _table([heading for heading, _ in columns], [[value(e) for _, value in columns] for e in evaluations])
    cards = [e.card["line"] for e in evaluations if e.card.get("line")]
    listed = "".join(f"<p>{escape(line)}</p>" for line in cards)
    return table + (f"<details><summary>How each was measured</summary>{listed}</details>" if cards else "")


def comparison(runs: Sequence[Run]) -> str:
    """A row for each run."""
    rows = []
    for run in runs:
        metrics = run.last.metrics if run.last else {}
        fid = next(iter(fids_of(metrics)), "")
        losses = [loss for _, loss in run.curve("loss")]
        tail = losses[-max(len(losses) // 10, 1) :]
        rows.append(
            [
                run.name,
                f"{run.samples:,}",
                _fixed(sum(tail) / len(tail), 4) if tail else "",
                _fixed(metrics.get("attribute_accuracy"), 3),
                _short(metrics.get(fid)),
                _fixed(metrics.get("clip_score"), 2),
                duration(run.seconds),
                run.restarts,
            ]
        )
    headings = [
        "run",
        "samples seen",
        "loss, last tenth",
        "attribute accuracy",
        "FID",
        "CLIP score",
        "time",
        "restarts",
    ]
    return f'<div style="margin-top:24px">{_table(headings, rows)}</div>'


def starts(run: Run) -> str:
    """When the run was begun and resumed; nothing for a run without restarts."""
    if run.restarts == 0:
        return ""
    rows = [[f"{row['n']:,}", row.get("world", ""), row.get("host", "")] for row in run.starts]
    return f"<h3>Starts and restarts</h3>{_table(['at samples seen', 'ranks', 'host'], rows)}"


def steps(run: Run) -> str:
    """What was done around the training, command by command with its time, where the run's folder tells (the demo)."""
    rows = [[step["heading"], duration(step["seconds"]), step["command"]] for step in run.steps]
    if not rows:
        return ""
    total = duration(sum(step["seconds"] for step in run.steps))
    return _table(["step", "time", "command"], [*rows, ["all steps", total, " "]], prose=["command"])


def facts_and_config(run: Run) -> str:
    """The run's own record (run.json: datasets, contract) and its resolved configuration, folded."""
    facts = json.dumps(run.facts, indent=2, ensure_ascii=False, sort_keys=True) if run.facts else ""
    return "".join(
        f"<details><summary>{heading}</summary><pre>{escape(text.strip())}</pre></details>"
        for heading, text in (("Datasets and contract", facts), ("Resolved configuration", run.config))
        if text
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]], prose: Sequence[str] = ()) -> str:
    """A table that scrolls by itself when the page is too narrow. prose: headings of columns whose text may wrap."""
    kinds = [' class="text"' if heading in prose else "" for heading in headings]
    lines = [f"<th{kind}>{escape(heading)}</th>" for heading, kind in zip(headings, kinds, strict=True)]
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(_cell(v))}</td>' for v, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{"".join(lines)}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    return "–" if value in (None, "") else str(value)


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "" if value is None else short(value)


def fids_of(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the FIDs among metrics: fid_democlip and its like, without their floors."""
    return [name for name in metrics if name.startswith("fid_") and "_floor" not in name]


def duration(seconds: float) -> str:
    """42 s, 7 min 30 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
