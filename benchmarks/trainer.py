"""The trainer's overhead over the bare UNet step and against accelerate with diffusers' EMAModel; ranks and traffic.

.venv/bin/python -m benchmarks.trainer [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table
from benchmarks.streaming.latents import Latents, write_cache
from benchmarks.training.traffic import THEORY
from benchmarks.training.trainer_peers import fitting
from benchmarks.training.trainer_side import Order
from pipeline.config import ModelConfig
from pipeline.config.loading.load import load
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.distributed.ranks import run_local
from pipeline.errors import ConfigError, DataError
from pipeline.storage.urls import open_storage

EPILOG = """\
keys: model=tiny (of conf/model/) batch=64 parts=overhead,ranks,traffic rounds=5 steps=30 ranks=1,2,4 samples=4096
(of the cache that is made for it)

overhead: one process with all cores; bare step, this trainer with everything on, and what diffusers' text-to-image
example does, in turns of `steps` steps. In as many rounds more, this trainer alone, with a commit in each.
ranks: processes of one thread each, over gloo, with the same global batch (strong) and the same share (weak).
traffic: bytes that a rank sends in a step, by ZeRO stage, as counted in PyTorch's collectives, against theory.
"""
SAVE_STEPS = 1000  # between commits, for their share of the time
MOST = {"overhead": 5.0, "ema": 1.0, "stall": 2.0}  # per cent
PARTS = ("overhead", "ranks", "traffic")


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    model: str = "tiny"
    batch: int = 64
    parts: str = "overhead,ranks,traffic"
    rounds: int = 5
    steps: int = 30
    ranks: str = "1,2,4"
    samples: int = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.trainer", *options.overrides])
    return guarded("benchmarks.trainer", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print."""
    if unknown := [part for part in plan.parts.split(",") if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]}; choose of {', '.join(PARTS)}")
    text = [f"# {command}\n\n" + "\n".join(machine(torch.device("cpu"), cores()))]
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:
        bench = Bench(plan, Path(folder))
        for part in plan.parts.split(","):
            text.append({"overhead": overhead, "ranks": ranks, "traffic": traffic}[part](bench))
            print(text[-1], file=sys.stderr, flush=True)
    page = "\n\n".join(text) + "\n"
    print(page)
    if write:
        path = keep(f"trainer-{plan.model}-{device_slug(torch.device('cpu'))}", page)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


class Bench:
    """A model, a matching cache, and the worlds that train on it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        model: ModelConfig = load("train", [f"model={plan.model}", "data.train=none", "run=none"]).model
        side, length = (8, 32) if plan.model == "tiny" else (32, 77)
        self.latents = Latents(
            name="benchmark",
            side=side,
            text="full",
            samples=plan.samples,
            length=length,
            width=model.context_width,
            shard_bytes=4_000_000,
        )
        self.model = fitting(model, self.latents)
        write_cache(self.latents, open_storage(str(folder / "cache")))

    def measure(
        self,
        work: Literal["time", "traffic"],
        world: int,
        sides: Mapping[str, str],
        batches: Mapping[str, int],
        *,
        threads: int,
        saves: bool = False,
        steps: int = 0,
    ) -> dict[str, Any]:
        """Measurements of rank 0 of a world."""
        out = self.folder / "found.json"
        order = Order(
            work=work,
            model=asdict(self.model),
            latents=asdict(self.latents),
            cache=str(self.folder / "cache"),
            batches=dict(batches),
            sides=dict(sides),
            rounds=self.plan.rounds,
            steps=steps or self.plan.steps,
            saves=saves,
            out=str(out),
        )
        status = run_local("benchmarks.training.trainer_side", [json.dumps(asdict(order))], world, threads)
        if status:
            raise DataError(f"{world} ranks that were to measure {work} ended with status {status}")
        return json.loads(out.read_text())


def step_s(timings: Mapping[str, Any]) -> float:
    """Median over rounds of the medians of their steps."""
    return median([median(seconds) for seconds in timings["rounds"]])


def paired(timings: Mapping[str, Mapping[str, Any]], side: str, other_side: str) -> float:
    """Ratio of a side's step to another side's: the median over rounds of the ratio within the round."""
    return median(
        [median(a) / median(b) for a, b in zip(timings[side]["rounds"], timings[other_side]["rounds"], strict=True)]
    )


def verdict(percent: float, limit: float) -> str:
    return f"{percent:.2f}% (target <= {limit:g}%: {'met' if percent <= limit else 'missed'})"


def stall_s(timings: Mapping[str, Any]) -> float:
    """Cost of a commit to the loop in seconds: the additional time of rounds that begin a commit, which includes
    waiting for it and the steps that it slows."""
    return median([sum(seconds) for seconds in timings["saved_rounds"]]) - median(
        [sum(seconds) for seconds in timings["rounds"]]
    )


def overhead(bench: Bench) -> str:
    """One process: the sides in turns, then commits."""
    sides = {"bare": "bare", "ours": "ours", "ours, plain PyTorch": "ours, plain PyTorch", "accelerate": "accelerate"}
    batches = dict.fromkeys(sides, bench.plan.batch)
    timings = bench.measure("time", 1, sides, batches, threads=cores())
    rows = []
    for name, side_timings in timings.items():
        seconds, ema = step_s(side_timings), side_timings["ema"]
        medians = spread([1e3 * median(round) for round in side_timings["rounds"]])
        over_bare_text = "" if name == "bare" else f"{100 * (paired(timings, name, 'bare') - 1):+.1f}%"
        share = f"{1e3 * ema:.2f} ms, {100 * ema / seconds:.2f}%" if ema else ""
        rows.append(
            [name, f"{1e3 * seconds:.1f}", medians, over_bare_text, share, f"{side_timings['parameters'] / 1e6:.1f} M"]
        )
    saved = bench.measure("time", 1, {"ours": "ours"}, batches, threads=cores(), saves=True)["ours"]
    stall, step = stall_s(saved), step_s(saved)
    write_s, size = median([side_timings[0] for side_timings in saved["writes"]]), saved["writes"][0][1]
    head = ("side", "ms a step", "medians of rounds", "over bare", "EMA", "parameters")
    over_bare = 100 * (paired(timings, "ours", "bare") - 1)
    return "\n".join(
        [
            f"## Overhead: {bench.plan.model}, batch {bench.plan.batch}, one process with {cores()} threads",
            "",
            table(head, rows),
            "",
            f"- this trainer over the bare step: {verdict(over_bare, MOST['overhead'])}",
            f"- accelerate and EMAModel take {paired(timings, 'accelerate', 'ours'):.2f} times as long as this trainer",
            f"- a commit of {size / 1e6:,.0f} MB to the local disk costs the loop {1e3 * stall:.0f} ms, and is there "
            f"after {write_s:.2f} s; at one every {SAVE_STEPS:,} steps that is "
            f"{verdict(100 * stall / (SAVE_STEPS * step), MOST['stall'])}",
        ]
    )


def ranks(bench: Bench) -> str:
    """Processes of one thread: strong and weak scaling, and the share of the EMA."""
    worlds = [int(number) for number in bench.plan.ranks.split(",")]
    largest_world = max(worlds)
    strong: list[list[str]] = []
    weak: list[list[str]] = []
    shares: dict[int, float] = {}
    first: dict[str, float] = {}
    for world in worlds:
        batches = {"strong": bench.plan.batch, "weak": bench.plan.batch // largest_world * world}
        timings = bench.measure("time", world, dict.fromkeys(batches, "ours"), batches, threads=1)
        for name, rows in (("strong", strong), ("weak", weak)):
            seconds, ema = step_s(timings[name]), timings[name]["ema"]
            rate = batches[name] / seconds
            first.setdefault(name, rate)
            shares |= {world: 100 * ema / seconds} if name == "strong" else {}
            cells = [f"{1e3 * seconds:.1f}", figure(rate), f"{rate / first[name]:.2f}"]
            rows.append([str(world), str(batches[name]), *cells, f"{1e3 * ema:.2f} ms, {100 * ema / seconds:.2f}%"])
    head = ("ranks", "global batch", "ms a step", "images/s", "of the first", "EMA")
    lines = [f"## Ranks: {bench.plan.model}, ZeRO 2 over gloo, one thread each, on {cores()} cores", ""]
    lines += ["Strong: the same global batch.", "", table(head, strong), ""]
    lines += ["Weak: the same share of each rank.", "", table(head, weak), ""]
    if 2 in shares:
        lines.append(f"- the average at 2 ranks (strong): {verdict(shares[2], MOST['ema'])}")
    return "\n".join(lines)


def traffic(bench: Bench) -> str:
    """Bytes that a rank sends."""
    rows = []
    for world in (int(number) for number in bench.plan.ranks.split(",")):
        if world == 1:
            continue
        sent_by_stage = bench.measure("traffic", world, {}, {"ours": bench.plan.batch}, threads=1, steps=2)
        unit = 4 * sent_by_stage["parameters"] * (world - 1) / world
        for stage, theory in THEORY.items():
            sent = sent_by_stage[str(stage)]
            total = sum(sent.values())
            parts_text = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in sorted(sent.items()) if count > 1e4)
            rows.append(
                [f"{world}, stage {stage}", f"{total / 1e6:.1f}", f"{total / unit:.2f}", f"{theory:.2f}", parts_text]
            )
    head = ("ranks, stage", "MB sent a step", "in 4 P (N-1)/N bytes", "theory", "of them, MB")
    return "\n".join([f"## Traffic: {bench.plan.model}, fp32, P parameters, N ranks", "", table(head, rows)])


if __name__ == "__main__":
    raise SystemExit(main())
