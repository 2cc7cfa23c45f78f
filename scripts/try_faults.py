"""Tries hostile inputs, damaged files, mistyped commands and kills on the product, and writes what became of them.

    python scripts/try_faults.py [WORD ...] [work=FOLDER] [out=FILE] [kills=N]

WORDs choose the cases whose area or name contains one of them. Each case runs a command in a copy of a small dataset
and run, in a fork of this process, so that a case costs a second. `out` gets the page in Markdown, as is
docs/measured/faults.md, and the exit status is 1 when a case did not end as it must.
All of it took 17 minutes on 2 cores beside a run of the tests.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", WANDB_MODE="disabled", HF_HUB_OFFLINE="1")

from benchmarks.machine import processor  # noqa: E402
from scripts.faults import files, inputs, kills, words  # noqa: E402
from scripts.faults.base import make_base  # noqa: E402
from scripts.faults.trial import Outcome, run_case  # noqa: E402

IMPORTED: tuple[str, ...] = (
    "pipeline.train",
    "pipeline.eval",
    "pipeline.export",
    "pipeline.sample",
    "pipeline.status",
    "pipeline.ledger",
)
IMPORTED += ("pipeline.report.page", "pipeline.preview", "preprocess.encode", "preprocess.index", "preprocess.verify")
IMPORTED += (
    "preprocess.reference",
    "preprocess.synthetic",
    "pipeline.config.loading.load",
    "diffusers",
    "hydra",
    "boto3",
)


def main(arguments: list[str]) -> int:
    """Runs the cases; returns the exit status."""
    options = dict(word.split("=", 1) for word in arguments if word.startswith(("work=", "out=", "kills=")))
    chosen = [word for word in arguments if not word.startswith(("work=", "out=", "kills="))]
    work = Path(options.get("work") or tempfile.mkdtemp(prefix="latentmill-faults-"))
    began = time.monotonic()
    make_base(work / "base")
    _import()
    outcomes = []
    for case in [*inputs.cases(), *files.cases(), *words.cases()]:
        if not chosen or any(word in case.area or word in case.name for word in chosen):
            outcomes.append(run_case(case, work / "base", work / "trial"))
            _report(outcomes[-1])
    problems: dict[str, tuple[int, list[str]]] = {}
    if (count := int(options.get("kills", 0 if chosen else 6))) > 0:
        problems["encode, killed at random"] = count, kills.kill_encodes(work / "base", work / "trial", count)
        problems["train, killed at random"] = count, kills.kill_trainings(work / "base", work / "trial", count)
    page = _page(outcomes, problems, time.monotonic() - began)
    if "out" in options:
        Path(options["out"]).write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    return int(any(outcome.wrong for outcome in outcomes) or any(found for _, found in problems.values()))


def _import() -> None:
    """Import what the commands need, so that forks need not."""
    import importlib

    import torch

    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)


def _report(outcome: Outcome) -> None:
    mark = "WRONG" if outcome.wrong else "ok"
    line = f"{mark:5} {outcome.seconds:5.1f} s {outcome.megabytes:5.0f} MB  {outcome.case.area}: {outcome.case.name}"
    sys.stderr.write(f"{line}{f': {outcome.wrong}' if outcome.wrong else ''}\n")


def _page(outcomes: list[Outcome], problems: dict[str, tuple[int, list[str]]], seconds: float) -> str:
    """The page that is committed."""
    areas: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        areas[outcome.case.area].append(outcome)
    lines = [
        "# What was tried and how it ended",
        "",
        "Hostile, damaged and mistyped things that were given to the verbs, and what became of them.",
        "",
        "    python scripts/try_faults.py out=docs/measured/faults.md    # writes this page",
        "",
        "Each case is one command on a copy of a small dataset and run. It ends as it must when it is refused in one",
        "line with status 1 or 2, or goes on and counts what it left out: without a traceback or a control character",
        "on the terminal and, where it is refused, with 5 s of one core and 200 MB more than the process that forks",
        "it. What must hold in the folder afterwards (nothing of others written over, no secret stored) is",
        "looked at too.",
        "",
        f"{processor()}, {os.cpu_count()} cores, {datetime.date.today():%d %B %Y}; {len(outcomes)} cases in "
        f"{seconds / 60:.0f} minutes.",
        "",
        "| area | tried | refused in a line | went on | not as it must | longest | most memory added |",
        "|---|---|---|---|---|---|---|",
    ]
    for area, found in areas.items():
        refused = sum(outcome.status != 0 and not outcome.wrong for outcome in found)
        went_on = sum(outcome.status == 0 and not outcome.wrong for outcome in found)
        wrong = len(found) - refused - went_on
        longest, most = max(o.seconds for o in found), max(o.megabytes for o in found)
        lines.append(
            f"| {area} | {len(found)} | {refused} | {went_on} | {wrong} | {longest:.1f} s | {max(most, 0):.0f} MB |"
        )
    for name, (count, found_problems) in problems.items():
        lines.append(f"| {name} | {count} | | {count - len(found_problems)} | {len(found_problems)} | | |")
    lines += ["", "## What did not end as it must", ""]
    wrong_ones = [f"- {o.case.area}: {o.case.name}: {o.wrong}" for o in outcomes if o.wrong]
    wrong_ones += [
        f"- {name}: {problem}" for name, (_, found_problems) in problems.items() for problem in found_problems
    ]
    lines += [line.replace("<", "&lt;")[:118] for line in wrong_ones] or ["Nothing."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
