"""Latents at several scales: in which denoising steps a picture is composed, and how well pictures come out that are
larger than those that were trained on (Rombach et al. 2021, section 4.3.2 and appendix D.1), on captioned shapes.

    .venv/bin/python -m benchmarks.signal_to_noise runs/signal            # about 25 minutes on two cores
    .venv/bin/python -m benchmarks.signal_to_noise runs/signal --list     # the commands, and their times

Every step is a command that one can also run by hand; it is printed and runs in a process of its own. steps.json in
FOLDER records the finished steps, so that a second run goes on where the first stopped. At the end the tables are
written to benchmarks/results/ and the pictures of docs/explained/signal_to_noise.md to docs/images/ (--page writes them
of what there is).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compression.runner import Listing, Runner
from benchmarks.latent_scale.plan import QUICK, SHORT, Plan, settle
from benchmarks.latent_scale.steps import Places, Study
from pipeline.distributed.exits import guarded
from pipeline.errors import ConfigError
from pipeline.log import show

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks") / "results"
SHOWN_AS = "runs/signal"
"""The study's folder in what is written: it holds no place of a machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.signal_to_noise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes, some 300 MB")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="time limit (60): runs of later seeds are left out beyond it"
    )
    parser.add_argument("--short", action="store_true", help="one seed, fewer samples, no pictures above 128")
    parser.add_argument("--quick", action="store_true", help="everything once with tiny sizes, in a minute or two")
    parser.add_argument("--list", action="store_true", help="print the commands instead, with the time they may take")
    parser.add_argument(
        "--page", action="store_true", help="run nothing: write the tables and pictures of what there is"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is written to")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    plan = QUICK if options.quick else SHORT if options.short else Plan()
    return guarded("benchmarks.signal_to_noise", lambda: run(plan, options))


def run(plan: Plan, options: argparse.Namespace) -> int:
    """Run, list, or write. Raises ConfigError, DestinationExists, StepFailed."""
    if not 0 < options.minutes <= 10_000:
        raise ConfigError(f"--minutes {options.minutes:g}: a number of minutes above 0 is wanted")
    dest: Path = options.folder
    if options.list:
        listing = Listing()
        Study(plan, Places(dest), listing).all()
        show(f"\n# about {listing.spent_s / 60:.0f} minutes in all")
        return 0
    if options.page and not dest.is_dir():
        raise ConfigError(f"{dest}: no study is there")
    settle(plan, dest)
    runner = Runner(dest, options.minutes * 60)
    if not options.page:
        Study(plan, Places(dest), runner).all()
    return report(plan, Places(dest), runner, options)


def report(plan: Plan, places: Places, runner: Runner, options: argparse.Namespace) -> int:
    """Write tables and pictures. Raises ConfigError where nothing was measured yet."""
    import torch

    from benchmarks.latent_scale import page
    from benchmarks.machine import device_slug, machine
    from pipeline.distributed.place import cores

    found = page.read(plan, places)
    if not found:
        raise ConfigError(f"{places.dest}: nothing was measured yet: run the study without --page")
    device = torch.device("cpu")
    words = " --quick" if options.quick else " --short" if options.short else ""
    commands = [
        (entry["command"].replace(f"{places.dest}{os.sep}", f"{SHOWN_AS}/"), float(entry["seconds"]))
        for entry in runner.done
    ]
    text = page.page(
        plan,
        found,
        f"python -m benchmarks.signal_to_noise {SHOWN_AS}{words}",
        [line for line in machine(device, cores()) if not line.startswith("- load")],  # of now
        commands,
    )
    path = options.root / RESULTS / f"signal-to-noise-{device_slug(device)}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    for one in (path, *page.draw(found, options.root / page.IMAGES)):
        show(f"written: {one}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
