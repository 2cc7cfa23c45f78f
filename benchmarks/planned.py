"""How near a plan comes to what happens: calibrate, plan, and then train what was planned.

.venv/bin/python -m benchmarks.planned [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table
from pipeline.demo import has_bfloat16
from pipeline.distributed.children import own_command, own_environment
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.errors import DataError

EPILOG = """\
keys: processes=2 seconds=40 (of calibrate's measurements) images=1000 samples=3200 (of the demo) steps=48 (of each of
the two models) folder= (to keep everything in; "" = one that is removed)

First `latentmill calibrate`, whose small networks are none of those that follow. Then `latentmill demo` with fewer
images and samples, and `latentmill train` of two models on its cache. Each is planned by `latentmill plan` before it
runs. Three minutes on two cores, which it wants for itself.
"""
BOUND = 0.15
"""Largest relative difference of images/s that is asked for."""
MODELS = {
    "small: 128 channels, two blocks a level, context": ("model=small", "optim.batch=16"),
    "three levels of 64 to 192 channels, no context": (
        *("model=tiny", "model.multipliers=[1,2,3]", "model.attention=[2,4]", "model.context_width=0"),
        *("task=unconditional", "optim.batch=32"),
    ),
}
"""Words of `train` by name. No reference of training/pace/references.py has their widths and depths."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    processes: int = 2
    seconds: float = 40.0
    images: int = 1000
    samples: int = 3200
    steps: int = 48
    folder: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planned",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.planned", *options.overrides])
    return guarded("benchmarks.planned", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print."""
    began = time.monotonic()
    head = "\n".join([f"# {command}", "", *machine(torch.device("cpu"), cores())])
    folder = Path(plan.folder or tempfile.mkdtemp(prefix="latentmill-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(plan, folder)
        parts = [head, bench.calibrated(), bench.demo(), bench.models()]
    finally:
        if not plan.folder:
            shutil.rmtree(folder)
    parts.append(f"- all of it took {time.monotonic() - began:.0f} s")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if write:
        path = keep(f"planned-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


class Bench:
    """The verbs, with a file of rates of their own."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.precision = "bf16" if has_bfloat16() else "fp32"  # as the demo chooses it
        self.environment = own_environment() | {
            "LATENTMILL_RATES": str(folder / "rates.json"),
            "WANDB_MODE": "disabled",
        }

    def verb(self, *words: str) -> str:
        """What a verb prints. Raises DataError where it fails."""
        done = subprocess.run(
            own_command("pipeline.cli", *words), env=self.environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise DataError(f"latentmill {' '.join(words)} ended with status {done.returncode}")
        return done.stdout

    def planned(self, name: str, *words: str) -> dict[str, Any]:
        """The figures of a plan, by section and name."""
        place = self.folder / f"{name}.json"
        self.verb("plan", *words, f"json={place}")
        sections = json.loads(place.read_text(encoding="utf-8"))["sections"]
        return {
            section: {one["name"]: one["value"] for one in figures["figures"]} for section, figures in sections.items()
        }

    def calibrated(self) -> str:
        """`latentmill calibrate`, as it prints what it found."""
        words = (f"launch.processes={self.plan.processes}", f"seconds={self.plan.seconds}")
        printed = self.verb("calibrate", *words, f"precision={self.precision}")
        print(printed, file=sys.stderr)
        lines = [line for line in printed.splitlines() if not line.startswith("rates:")]
        return "\n".join(["## latentmill calibrate", "", *(f"    {line}" for line in lines)])

    @property
    def data(self) -> Path:
        return self.folder / "demo" / "data"

    def demo(self) -> str:
        """A small demo, step by step beside its plan."""
        dest = self.folder / "demo"
        words = (f"images={self.plan.images}", f"samples={self.plan.samples}", f"processes={self.plan.processes}")
        began = time.monotonic()
        self.verb("demo", f"dest={dest}", *words)
        print(f"demo: {time.monotonic() - began:.0f} s", file=sys.stderr)
        steps = json.loads((dest / "steps.json").read_text(encoding="utf-8"))
        train = next(step for step in steps if " train " in f" {step['command']} ")
        of_train = [word for word in shlex.split(train["command"])[2:] if not word.startswith("run=")]
        found = self.planned("demo", *of_train)
        rows_ = rows(dest)
        ran = median([row["images_per_s"] for row in rows_])
        stepping = self.plan.samples / ran
        evaluated = sum(
            json.loads(path.read_text(encoding="utf-8"))["seconds"]
            for path in sorted((dest / "evals").glob("*/metrics.json"))
        )
        whole = 3600 * found["whole"]["hours"]
        lines = [
            ["images/s of training", figure(found["training"]["images/s"]), figure(ran)],
            ["seconds of steps", figure(3600 * found["training"]["hours of steps"]), figure(stepping)],
            ["seconds of evaluations", figure(3600 * found["evaluations"]["hours of evaluations"]), figure(evaluated)],
            ["seconds of the whole step `train`, start-up included", figure(whole), figure(train["seconds"])],
        ]
        text = table(("latentmill demo, train", "planned", "as it ran"), lines)
        verdicts = [
            "- images/s: " + verdict(found["training"]["images/s"], ran),
            f"- hours: planned {whole / 3600:.4f}, as it ran {train['seconds'] / 3600:.4f} "
            f"({whole / train['seconds'] - 1:+.0%}); the plan counts no start-up of processes",
        ]
        return "\n".join(["## latentmill demo " + " ".join(words), "", text, "", *verdicts])

    def models(self) -> str:
        """Two models on the demo's cache: planned and measured images/s."""
        lines, verdicts = [], []
        for number, (name, words) in enumerate(MODELS.items()):
            batch = next(int(word.partition("=")[2]) for word in words if word.startswith("optim.batch="))
            run = self.folder / f"run-{number}"
            common = (
                *(f"data.train={self.data / 'cache'}", "data.val=", "deepspeed=zero2", *words),
                *(f"launch.processes={self.plan.processes}", f"samples={batch * self.plan.steps}"),
                f"precision={self.precision}",
            )
            found = self.planned(f"model-{number}", *common)["training"]["images/s"]
            self.verb("train", *common, f"run={run}", f"tracking.every={4 * batch}", "tracking.wandb=off")
            rates = [row["images_per_s"] for row in rows(run)]
            ran = median(rates)
            lines.append([name, figure(found), figure(ran), spread(rates), f"{found / ran - 1:+.0%}"])
            verdicts.append(f"- {name}: {verdict(found, ran)}")
            print(verdicts[-1], file=sys.stderr)
        head = ("model", "planned images/s", "as it ran", "rows of metrics", "planned over run")
        return "\n".join(["## Two models that nothing was fitted to", "", table(head, lines), "", *verdicts])


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of training in a run's metrics, but for the first, in which libraries are loaded."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "images_per_s" in row][1:]


def verdict(planned: float, ran: float) -> str:
    """How far a planned figure is off, and whether that is within BOUND."""
    off = planned / ran - 1
    met = "met" if abs(off) <= BOUND else "missed"
    return f"planned {figure(planned)}, as it ran {figure(ran)}: {off:+.1%} (asked: {BOUND:.0%}: {met})"


if __name__ == "__main__":
    raise SystemExit(main())
