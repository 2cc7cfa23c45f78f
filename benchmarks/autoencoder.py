"""Training steps of an autoencoder with its discriminator beside those of diffusers' training scripts: speed, memory.

.venv/bin/python -m benchmarks.autoencoder [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.encoding.presets import changed
from pipeline.config import FirstStageLossConfig, GanConfig
from pipeline.config.loading.load import load
from pipeline.distributed.children import own_command
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.distributed.ranks import run_command
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from benchmarks.first_stage.measured import Order

EPILOG = """\
keys: cases=kl_small,vq_small_f8 (of conf/autoencoder/) batch=16 side=64 perceptual=alex (alex, vgg or none)
precision=fp32 device=cpu threads=0 (all cores) rounds=5 steps=4

The sides take turns in one process; each side's memory is measured in a process of its own. A step updates both
networks once. The script's step reads two batches for that, ours one. Images/s count those that both networks were
updated with; beside them are those that were read. Processor time is what tells on a machine with other work, with
threads=1. What the script's side does and leaves out is said in
benchmarks/first_stage/sides.py.
"""
OURS = ("ours, ZeRO 2", "ours, plain PyTorch")
PEER = "diffusers' script"
SAME = 1e-3
"""Relative difference that reconstructions by the two sides' networks may have."""
SPEED, MEMORY = 1.0, 1.0
"""Ratios that are meant to be reached: images/s at least, memory at most."""
IMAGES = 256
"""Pictures of the cache that is made, at least; a whole number of batches."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    cases: str = "kl_small,vq_small_f8"
    batch: int = 16
    side: int = 64
    perceptual: Literal["alex", "vgg", "none"] = "alex"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0
    rounds: int = 5
    steps: int = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoencoder",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.autoencoder", *options.overrides])
    return guarded("benchmarks.autoencoder", lambda: run(changed(Plan(), options.overrides), command, options.write))


def run(plan: Plan, command: str, write: bool) -> int:
    """Measure and print. Raises ConfigError, and DataError when the sides' networks differ."""
    import torch

    from benchmarks.machine import device_slug, keep, machine

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch sees no CUDA device here")
    device = torch.device(plan.device)
    text = [f"# {command}\n\n" + "\n".join(machine(device, plan.threads or cores()))]
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:
        bench = Bench(plan, Path(folder))
        for name in plan.cases.split(","):
            text.append(report(plan, name, bench.time(name), bench.memory(name)))
            print(text[-1], file=sys.stderr, flush=True)
    page = "\n\n".join(text) + "\n"
    print(page)
    if write:
        path = keep(f"autoencoder-{plan.cases.replace(',', '-')}-{device_slug(device)}", page)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


class Bench:
    """A cache of captioned shapes as pixels, and the processes that train on it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.cache = folder / "pixels"
        images = -(-IMAGES // plan.batch) * plan.batch
        shapes = folder / "shapes"
        self._latentmill("preprocess.synthetic", f"dest={shapes}", f"images={images}")
        source = f"source={shapes}/*.tar"
        self._latentmill(
            "preprocess.encode", "stored=pixels", source, f"dest={self.cache}", f"resolution=[{plan.side}]"
        )

    def _latentmill(self, module: str, *words: str) -> None:
        if status := run_command(own_command(module, *words)):
            raise DataError(f"{module} {' '.join(words)} ended with status {status}")

    def order(self, name: str, work: Literal["time", "memory"], sides: tuple[str, ...]) -> Order:
        """Instructions for a process."""
        from benchmarks.first_stage.measured import Order

        plan = self.plan
        return Order(
            work=work,
            stage=asdict(load("autoencoder", [f"autoencoder={name}", "run=none", "data.train=none"]).autoencoder),
            gan=asdict(GanConfig(weight=0.5)),
            loss=asdict(FirstStageLossConfig(perceptual="none" if plan.perceptual == "none" else "given")),
            batch=plan.batch,
            side=plan.side,
            cache=str(self.cache),
            precision=plan.precision,
            perceptual=plan.perceptual,
            device=plan.device,
            threads=plan.threads,
            sides=sides,
            rounds=plan.rounds,
            steps=plan.steps,
            out=str(self.folder / "found.json"),
        )

    def _measure(self, order: Order) -> dict[str, Any]:
        status = run_command([sys.executable, "-m", "benchmarks.first_stage.measured", order.to_json()])
        if status:
            raise DataError(f"the process that was to measure {order.work} of {order.sides} ended with status {status}")
        return json.loads(Path(order.out).read_text(encoding="utf-8"))

    def time(self, name: str) -> dict[str, Any]:
        """Seconds of the steps of all sides."""
        found = self._measure(self.order(name, "time", (*OURS, PEER)))
        if found["disagreement"] > SAME:
            raise DataError(
                f"{name}: reconstructions by our layers and by diffusers' differ by {found['disagreement']:.2g} of "
                "their size: they are not the same network"
            )
        return found

    def memory(self, name: str) -> dict[str, float]:
        """Peak memory of each side in bytes."""
        return {side: float(self._measure(self.order(name, "memory", (side,)))["bytes"]) for side in (*OURS, PEER)}


def report(plan: Plan, name: str, found: Mapping[str, Any], memory: Mapping[str, float]) -> str:
    """A case's table and its ratios."""
    from benchmarks.machine import figure, median, spread, table

    sides: Mapping[str, Any] = found["sides"]
    rows = []
    for side, timings in sides.items():
        medians = [median(seconds) for seconds in timings["rounds"]]
        step = median(medians)
        rows.append(
            [
                *(side, f"{1e3 * step:.0f}", spread([1e3 * one for one in medians])),
                f"{1e3 * median(timings['cpu']):.0f}",
                *(figure(timings["images"] / step), figure(timings["read"] / step), f"{memory[side] / 1e9:.2f}"),
            ]
        )
    head = ("side", "ms a step", "medians of rounds", "of processors", "images/s", "images read/s", "peak memory, GB")
    lines = [
        f"## {name}: {plan.side}x{plan.side} pixels, batch {plan.batch}, {plan.precision}, "
        f"st-LPIPS ({plan.perceptual}, {found['perceptual']})",
        "",
        table(head, rows),
        "",
    ]
    for side in OURS:
        ratio = faster(sides, side)
        lines.append(f"- {side}: images/s over the script's: {_at_least(ratio, SPEED)}")
        share = memory[side] / memory[PEER]
        lines.append(f"- {side}: memory over the script's: {_at_most(share, MEMORY)}")
    return "\n".join(lines)


def faster(sides: Mapping[str, Any], side: str) -> float:
    """Images/s of a side over the peer's: the median over rounds of the ratio within the round."""
    from benchmarks.machine import median

    mine, theirs = sides[side], sides[PEER]
    pairs = zip(mine["rounds"], theirs["rounds"], strict=True)
    return median([median(b) / median(a) for a, b in pairs]) * mine["images"] / theirs["images"]


def _at_least(value: float, least: float) -> str:
    return f"{value:.2f} (target >= {least:g}: {'met' if value >= least else 'missed'})"


def _at_most(value: float, most: float) -> str:
    return f"{value:.2f} (target <= {most:g}: {'met' if value <= most else 'missed'})"


if __name__ == "__main__":
    raise SystemExit(main())
