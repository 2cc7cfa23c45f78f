"""The compression study: which f serves a denoiser best on captioned shapes, at equal training time on this machine
(Rombach et al. 2021, section 4.1, figures 6 and 7).

    .venv/bin/python -m benchmarks.compression_study runs/compression             # two hours on two cores
    .venv/bin/python -m benchmarks.compression_study runs/compression --list      # the commands, and their times

Every step is a command that one can also run by hand; it is printed and runs in a process of its own. steps.json in
FOLDER records the finished steps, so that a second run goes on where the first stopped. The short runs that measure
rates want the machine to themselves, and so does the last measurement, of drawing; training does not. At the end the
page measured/compression of docs/ and its charts are written (--page writes them of what there is).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compression.plan import QUICK, Plan, settle
from benchmarks.compression.runner import Listing, Runner
from benchmarks.compression.steps import Places, Study
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError
from pipeline.log import show

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes, some 5 GB")
    parser.add_argument(
        "--hours",
        type=float,
        default=5.0,
        help="time limit (5): evaluations for which none is left are left out, by name",
    )
    parser.add_argument("--quick", action="store_true", help="everything once with tiny sizes, in a minute or two")
    parser.add_argument("--list", action="store_true", help="print the commands instead, with the time they may take")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page of what there is")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ lies that is written to (the checkout)")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    plan = QUICK if options.quick else Plan()
    return guarded("benchmarks.compression_study", lambda: run(plan, options))


def run(plan: Plan, options: argparse.Namespace) -> int:
    """Run, list, or write the page. Raises ConfigError, DestinationExists, StepFailed."""
    if not 0 < options.hours <= 100:
        raise ConfigError(f"--hours {options.hours:g}: a number of hours above 0 is wanted")
    dest: Path = options.folder
    if options.list:
        listing = Listing()
        Study(plan, Places(dest), listing, lists=True).all()
        show(f"\n# about {listing.spent_s / 3600:.1f} hours in all, of {options.hours:g}")
        return 0
    if options.page and not dest.is_dir():
        raise ConfigError(f"{dest}: no study is there")
    plan = settle(plan, dest)
    runner = Runner(dest, options.hours * 3600)
    study = Study(plan, Places(dest), runner)
    if not options.page:
        study.all()
    return report(plan, study.places, runner, options)


def report(plan: Plan, places: Places, runner: Runner, options: argparse.Namespace) -> int:
    """Write the page."""
    import torch

    from benchmarks.compression import page, results
    from benchmarks.machine import machine
    from pipeline.distributed.place import cores

    found = results.read(plan, places)
    words = ["--quick"] if options.quick else []
    facts = page.Facts(
        machine=[line for line in machine(torch.device("cpu"), cores()) if not line.startswith("- load")],  # of now
        command=" ".join([".venv/bin/python -m benchmarks.compression_study runs/compression", *words]),
        commands=[(_without(places.dest, entry["command"]), float(entry["seconds"])) for entry in runner.done],
    )
    for path in page.write(options.root, plan, found, facts):
        show(f"written: {path}")
    show(f"{page.best(plan, found)}\nA new page also wants its line in mkdocs.yml and docs/index.md")
    return 0


def _without(dest: Path, command: str) -> str:
    """A command in which the study's folder has the name of the page's command: pages hold no place of a machine."""
    return command.replace(f"{dest}{os.sep}", "runs/compression/")


if __name__ == "__main__":
    raise SystemExit(main())
