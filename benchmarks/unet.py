"""How fast the UNet is, against diffusers' UNet2DConditionModel with the same weights and inputs.

.venv/bin/python -m benchmarks.unet [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table, verdict
from benchmarks.network.unet_limit import Rates, counted, measure_rates
from benchmarks.network.unet_side import SIDES, Order
from pipeline.config import ModelConfig
from pipeline.config.loading.load import load
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.errors import DataError
from pipeline.interchange import unet as convert
from pipeline.models.unet.model import UNet

EPILOG = """\
keys: cases=tiny,sd1,sd2 work=train,infer sides=all rounds=3 steps=0 (timed in a turn; 0 = as the case wants) dtype=fp32
(or bf16: autocast on both sides) threads=0 (all cores) compiled=false (also torch.compile: minutes for large models)

Rounds take turns; each turn is a process of its own that has the machine to itself: it builds the network, takes
steps that are not timed, and then those that are.
"""
TARGETS = {
    "train": {"diffusers": 1.5, "diffusers, best": 1.15},
    "infer": {"diffusers": 1.3, "diffusers, best": 1.1},
}
SAME = {"fp32": 1e-4, "bf16": 5e-2}  # largest difference between the sides' first predictions, of the largest value


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    cases: str = "tiny,sd1,sd2"
    work: str = "train,infer"
    sides: str = "all"
    rounds: int = 3
    steps: int = 0
    dtype: str = "fp32"
    threads: int = 0
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """A model and its input. side: of the square latent. steps: timed in a turn, and half as many before."""

    model: str
    batch: int
    side: int
    context: int
    steps: int


CASES = {
    "tiny": Case("tiny", 64, 8, 32, 30),
    "small": Case("small", 32, 16, 32, 10),
    "sd1": Case("sd1", 1, 32, 77, 3),
    "sd2": Case("sd2", 1, 32, 77, 3),
}


@dataclass
class Turns:
    """side -> measurements of each turn."""

    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def seconds(self, side: str) -> float:
        """Median over turns of the medians of their steps."""
        return median([median(turn["seconds"]) for turn in self.turns[side]])

    def best(self, *sides: str) -> float:
        return min(self.seconds(side) for side in sides if side in self.turns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unet",
        description="How fast the UNet is, against diffusers' with the same weights and inputs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    command = " ".join(["python -m benchmarks.unet", *options.overrides])
    return guarded("benchmarks.unet", lambda: run(changed(Plan(), options.overrides), command, write=options.write))


def run(plan: Plan, command: str, *, write: bool) -> int:
    """Measure and print. Raises DataError when the sides compute different outputs."""
    threads = plan.threads or cores()
    parts = ["\n".join([f"# {command}", "", *machine(torch.device("cpu"), threads)])]
    rates = measure_rates(threads, plan.dtype)
    parts.append("\n".join(rates.lines()))
    print(parts[-1], file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:
        for name in plan.cases.split(","):
            case = CASES[name]
            config = model_of(case.model)
            weights = Path(folder) / "weights.safetensors"
            write_weights(config, weights)
            for work in plan.work.split(","):
                turns = measure(plan, case, config, work, weights, threads)
                parts.append(report(name, case, config, work, turns, rates))
                print(parts[-1], file=sys.stderr, flush=True)
    text = "\n\n".join(parts) + "\n"
    print(text)
    if write:
        path = keep(f"unet-{plan.dtype}-{device_slug(torch.device('cpu'))}", text)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def model_of(name: str) -> ModelConfig:
    """A configuration of conf/model/."""
    return load("train", [f"model={name}", "data.train=none", "run=none"]).model


def write_weights(config: ModelConfig, path: Path) -> None:
    """Write seeded weights under diffusers' names. Weights that start at zero are random too, so that outputs
    differ."""
    unet = UNet(config)
    unet.reset_parameters(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        if not parameter.data.any():
            parameter.data.uniform_(-0.02, 0.02, generator=generator)
    state = convert.to_diffusers(unet.state_dict(), config)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def measure(plan: Plan, case: Case, config: ModelConfig, work: str, weights: Path, threads: int) -> Turns:
    """Measure all sides in rounds."""
    sides = [s for s in SIDES if plan.sides == "all" or s in plan.sides.split("+")]
    if not plan.compiled:
        sides = [s for s in sides if s != "ours, compiled"]
    turns = Turns({side: [] for side in sides})
    steps = plan.steps or case.steps
    for number in range(plan.rounds):
        for side in sides:
            order = Order(
                side=side,
                weights=str(weights),
                work=work,
                model=asdict(config),
                batch=case.batch,
                height=case.side,
                width=case.side,
                context=case.context,
                dtype=plan.dtype,
                threads=threads,
                warm=-(-steps // 2),
                steps=steps,
            )
            turn = take_turn(order)
            turns.turns[side].append(turn)
            line = f"{case.model} {work} round {number + 1}: {side} {1e3 * median(turn['seconds']):.1f} ms"
            print(line, file=sys.stderr, flush=True)
    check_same(turns, plan.dtype)
    return turns


def take_turn(order: Order) -> dict[str, Any]:
    """Run a turn of one side in a process and return its measurements."""
    command = [sys.executable, "-m", "benchmarks.network.unet_side", json.dumps(asdict(order))]
    environment = os.environ | {"OMP_NUM_THREADS": str(order.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DataError(f"the side {order.side} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def check_same(turns: Turns, dtype: str) -> None:
    """Raise DataError unless the first predictions of all sides agree."""
    outputs = {side: torch.tensor(side_turns[0]["output"]) for side, side_turns in turns.turns.items()}
    expected = next(iter(outputs.values()))
    for side, output in outputs.items():
        difference = float((output - expected).abs().max() / expected.abs().max())
        if not difference <= SAME[dtype]:
            raise DataError(f"{side} predicts something else: {difference:.2g} of the largest value")


def report(name: str, case: Case, config: ModelConfig, work: str, all_turns: Turns, rates: Rates) -> str:
    """A table and the verdicts on its targets."""
    work_done = counted(config, case.batch, case.side, case.context, train=work == "train")
    limit = rates.seconds(work_done)
    rows = [["limit: products and convolutions alone", f"{limit * 1e3:.1f}", "", "", "1.00", ""]]
    for side, turns in all_turns.turns.items():
        seconds = all_turns.seconds(side)
        medians = [median(turn["seconds"]) for turn in turns]
        first = max(turn["first"] for turn in turns)
        peak = median([turn["peak"] for turn in turns]) / 1e9
        row = [side, f"{seconds * 1e3:.1f}", spread([1e3 * s for s in medians]), figure(case.batch / seconds)]
        rows.append([*row, f"{limit / seconds:.2f}", f"{peak:.2f} GB; first step {first:.1f} s"])
    head = (f"{name}, {work}", "ms a step", "medians of turns", "images/s", "of the limit", "peak memory")
    lines = [
        f"## {name}: {work}, batch {case.batch}, latents {case.side}x{case.side}, context {case.context}",
        "",
        f"{work_done.total / 1e9:,.1f} GFLOP a step ({work_done.convolutions / work_done.total:.0%} in convolutions)",
        "",
        table(head, rows),
        "",
    ]
    our_seconds = all_turns.best("ours", "ours, compiled")
    for peer, target in TARGETS[work].items():
        if peer in all_turns.turns:
            lines.append(f"- against {peer}: {verdict(all_turns.seconds(peer) / our_seconds, target)}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
