"""What guidance without retraining reaches on captioned shapes: a classifier, a picture and a caption by CLIP, images
that begin from others, and regions that are kept, of the demo's model without conditioning.

    latentmill demo tasks=all dest=runs/demo
    latentmill train experiment=shapes_classifier data.train=runs/demo/data/cache data.val=runs/demo/data/cache-val \\
        run=runs/classifier
    .venv/bin/python -m benchmarks.guidance_figures runs/guidance             # 25 minutes on two cores
    .venv/bin/python -m benchmarks.guidance_figures runs/guidance --list      # the commands, and their times

Every step is a command that one can also run by hand; it is printed and runs in a process of its own. steps.json in
FOLDER records the finished steps, so that a second run goes on where the first stopped. The run is copied before it is
evaluated; nothing of the demo's folder changes. At the end the page measured/guidance of docs/ is written (--page
writes it of what there is).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compression.runner import Listing, Runner
from benchmarks.guidance.plan import QUICK, Places, Plan, copy_run, settle
from benchmarks.guidance.results import chosen_weight, read
from benchmarks.guidance.steps import Figures
from benchmarks.guidance.verdicts import Read, verdicts
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError
from pipeline.log import show

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ".venv/bin/python -m benchmarks.guidance_figures runs/guidance"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guidance_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_places(parser)
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="time limit (40): what is only tried is left out where none is left"
    )
    parser.add_argument("--quick", action="store_true", help="everything once with tiny sizes")
    parser.add_argument("--list", action="store_true", help="print the commands instead, with the time they may take")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page of what there is")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    plan = QUICK if options.quick else Plan()
    return guarded("benchmarks.guidance_figures", lambda: run(plan, options))


def add_places(parser: argparse.ArgumentParser) -> None:
    """Arguments that say where things lie."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes, some 100 MB")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of latentmill demo tasks=all")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier"), help="run of the classifier")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ lies that is written to (the checkout)")


def run(plan: Plan, options: argparse.Namespace) -> int:
    """Run, list, or write the page. Raises ConfigError, DestinationExists, StepFailed."""
    if not options.minutes > 0:
        raise ConfigError(f"--minutes {options.minutes:g}: a number of minutes above 0 is wanted")
    places = Places(options.folder, options.demo, options.classifier)
    if options.list:
        listing = Listing()
        Figures(plan, places, listing, lambda: plan.clip[len(plan.clip) // 2]).all()
        show(f"\n# about {listing.spent_s / 60:.0f} minutes in all, of {options.minutes:g}")
        return 0
    if options.page and not places.run.is_dir():
        raise ConfigError(f"{places.dest}: no figures are there")
    settle(plan, places.dest)
    runner = Runner(places.dest, options.minutes * 60)
    if not options.page:
        places.require()
        copy_run(places)
        Figures(plan, places, runner, lambda: chosen_weight(plan, read(places.run))).all()
    return report(plan, places, runner, options)


def report(plan: Plan, places: Places, runner: Runner, options: argparse.Namespace) -> int:
    """Write the page."""
    import torch

    from benchmarks.guidance.page import Facts, write
    from benchmarks.machine import machine, table
    from pipeline.distributed.place import cores

    facts = Facts(
        machine=[line for line in machine(torch.device("cpu"), cores()) if not line.startswith("- load")],  # of now
        command=f"{COMMAND} --quick" if options.quick else COMMAND,
        commands=[(_without(places, entry["command"]), float(entry["seconds"])) for entry in runner.done],
    )
    path = write(options.root, plan, places, facts)
    rows = [verdict.row for verdict in verdicts(Read(plan, places))]
    show(f"{table(('figure', 'asked', 'measured', 'reached'), rows)}\nwritten: {path}")
    show("A new page also wants its line in mkdocs.yml and docs/index.md")
    return 0


def _without(places: Places, command: str) -> str:
    """A command in which folders have the names of the page's command: pages hold no place of a machine."""
    names = {places.dest: "runs/guidance", places.demo: "runs/demo", places.classifier: "runs/classifier"}
    for path in sorted(names, key=lambda one: -len(str(one))):
        command = command.replace(f"{path}{os.sep}", f"{names[path]}/").replace(f"={path} ", f"={names[path]} ")
    return command


if __name__ == "__main__":
    raise SystemExit(main())
