"""What evaluation costs: features beside the bare networks, precision and recall's memory, a whole evaluation, and
training beside one.

.venv/bin/python -m benchmarks.evaluation [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table, verdict
from benchmarks.streaming.latents import Latents, write_cache
from benchmarks.training.trainer_peers import Ours, fitting
from pipeline.config import DeepSpeedConfig
from pipeline.config.loading.load import load
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.distributed.world import World
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.beside import NICE
from pipeline.evaluation.features.inception import SIDE
from pipeline.evaluation.features.networks import load_features
from pipeline.evaluation.metrics.manifold import precision_recall
from pipeline.storage.urls import open_storage

EPILOG = """\
keys: parts=features,memory,whole,beside run=RUN (of captioned shapes, for the last two: `latentmill demo` makes one)
images=5000 rounds=5

features: pictures of 256 pixels (64 for the demo's CLIP) to features, beside the network alone on what it reads.
memory: what precision and recall add to the process, for N and N pictures.
whole: `latentmill eval run=RUN images=...` as a process, from its start to its end, as training samples.
beside: steps of training with all cores, alone and beside an evaluation of RUN at the priority of eval.where=job.
"""
LEAST = 0.95  # of the bare network's images/s
MOST_SECONDS = 240.0
BATCH = 32
STEPS = 20  # of training in a round
SAMPLER = ("sampler", "steps", "guidance", "guidance_low", "guidance_high", "rescale")


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    parts: str = "features,memory,whole,beside"
    run: str = ""
    images: int = 5000
    rounds: int = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description="What evaluation costs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the tables to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    shown_overrides = [
        override for override in options.overrides if not override.startswith("run=")
    ]  # results do not name paths
    command = " ".join(["python -m benchmarks.evaluation", *shown_overrides])
    return guarded("benchmarks.evaluation", lambda: run(changed(Plan(), options.overrides), command, options.write))


def run(plan: Plan, command: str, write: bool) -> int:
    """Measure and print. Raises ConfigError."""
    parts = plan.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]}; choose of {', '.join(PARTS)}")
    if not plan.run and {"whole", "beside"} & set(parts):
        raise ConfigError("the parts whole and beside want run=RUN, a run of captioned shapes (`latentmill demo`)")
    torch.set_num_threads(cores())
    text = ["\n".join([f"# {command}", "", *machine(torch.device("cpu"), cores())])]
    for part in parts:
        text.append(PARTS[part](plan))
        print(text[-1], file=sys.stderr, flush=True)
    page = "\n\n".join(text) + "\n"
    print(page)
    if write:
        path = keep(f"evaluation-{device_slug(torch.device('cpu'))}", page)
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def features(plan: Plan) -> str:
    """Images/s of networks with random weights: from pictures, and of the network alone on its input."""
    rows, verdicts = [], []
    for name, side in (("democlip", 64), ("inception", 256)):
        network = load_features(name, "cpu", 0)
        pictures = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8)
        bare = bare_network(name, network.network)
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        for number in range(plan.rounds + 1):
            for kind, act in (("ours", partial(network, pictures)), ("bare", bare)):
                began, done = time.perf_counter(), 0
                while time.perf_counter() - began < 1.0:
                    act()
                    done += BATCH
                if number:  # the first round is not counted
                    rates[kind].append(done / (time.perf_counter() - began))
        ratio = median([our_rate / bare_rate for our_rate, bare_rate in zip(rates["ours"], rates["bare"], strict=True)])
        rows += [
            [f"{name}, {kind}", figure(median(kind_rates)), spread(kind_rates)] for kind, kind_rates in rates.items()
        ]
        verdicts.append(f"- {name} of the bare network: {verdict(ratio, LEAST)}")
    lines = [f"## Features: {BATCH} pictures at once, {plan.rounds} rounds of a second", ""]
    return "\n".join([*lines, table(("features", "images/s", "rounds"), rows), "", *verdicts])


def bare_network(name: str, network: Callable[[np.ndarray], Tensor]) -> Callable[[], Tensor]:
    """The network alone, on prepared inputs of its own size."""
    captured = {cell.cell_contents for cell in network.__closure__ or () if callable(cell.cell_contents)}
    network_alone: Any
    if name == "democlip":
        from pipeline.config import EncodersConfig
        from pipeline.models.encoders.text import load_text

        tower = load_text(EncodersConfig(seed=0), "cpu")
        network_alone, x = tower.model.encode_image, torch.randn(BATCH, 3, 64, 64)
    else:
        network_alone = next(value for value in captured if isinstance(value, torch.nn.Module))
        x = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1

    def act() -> Tensor:
        with torch.no_grad():
            return network_alone(x)

    return act


def memory(plan: Plan) -> str:
    """Memory of precision and recall, each measured in its own process, since a process's peak never falls."""
    rows = []
    for count in (5_000, 20_000, 50_000):
        code = f"from benchmarks.evaluation import held; print(held({count}, 64))"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        added, seconds = json.loads(done.stdout.splitlines()[-1])
        rows.append([f"{count:,}", f"{2 * count * 64 * 8 / 1e6:.0f}", f"{added / 1e6:.0f}", f"{seconds:.1f}"])
    head = ("N of each", "features, MB", "added, MB", "s")
    return "\n".join(["## Precision and recall, 64 values", "", table(head, rows)])


def held(count: int, width: int) -> list[float]:
    """[bytes that precision and recall of `count` pictures need besides the features, seconds], for JSON."""
    generator = torch.Generator().manual_seed(0)
    generated, real = (torch.randn(count, width, generator=generator) for _ in range(2))
    precision_recall(generated[:100], real[:100])
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    precision_recall(generated, real)
    return [1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before), time.perf_counter() - began]


def whole(plan: Plan) -> str:
    """The verb."""
    command = [*evaluation(plan, plan.images), "seed=7"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise DataError(f"the evaluation ended with status {done.returncode}")
    line = next(line for line in done.stdout.splitlines() if "fid_democlip" in line)
    limit_s = MOST_SECONDS * plan.images / Plan.images
    outcome = "met" if seconds <= limit_s else "missed"
    return "\n".join(
        [
            f"## A whole evaluation of {plan.images:,} captioned shapes, {cores()} cores",
            "",
            f"- {' '.join(argument for argument in command[3:] if not argument.startswith('run='))}",
            f"- {seconds:.0f} s from the process's start to its end, {plan.images / seconds:.1f} images/s (target <= "
            f"{limit_s:.0f} s: {outcome})",
            f"- {re.sub(r'[ ]+', ' ', line.strip())}",
        ]
    )


def evaluation(plan: Plan, images: int) -> list[str]:
    """Command line of the verb with the sampler of the run's own evaluations."""
    import yaml

    sampler = yaml.safe_load(open_storage(plan.run).get("config.yaml"))["eval"]["sampler"]
    settings = [f"{name}={sampler[name]}" for name in SAMPLER]
    return [sys.executable, "-m", "pipeline.cli", "eval", f"run={plan.run}", f"images={images}", *settings]


def beside(plan: Plan) -> str:
    """Steps of training in this process, alone and beside an evaluation in another."""
    latents = Latents(name="b", side=8, text="full", samples=2048, length=32, width=128, shard_bytes=4_000_000)
    model = fitting(load("train", ["model=tiny", "data.train=none", "run=none"]).model, latents)
    with tempfile.TemporaryDirectory(prefix="latentmill-benchmark-") as folder:
        write_cache(latents, open_storage(folder))
        side = Ours(model, latents, 32, World(), folder, DeepSpeedConfig(engine="torch"))

        def round_s() -> float:
            seconds = []
            for _ in range(STEPS):
                began = time.perf_counter()
                side.step()
                seconds.append(time.perf_counter() - began)
            return median(seconds)

        round_s()
        alone, with_it = [], []
        for number in range(plan.rounds):
            alone.append(round_s())
            command = ["nice", "-n", str(NICE), *evaluation(plan, 100_000), f"seed={100 + number}"]
            job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
            time.sleep(15)  # by then it samples
            if job.poll() is not None:
                raise DataError(f"the evaluation that was to run beside training ended with status {job.returncode}")
            with_it.append(round_s())
            job.kill()
            job.wait()
        side.close()
    slower = median([b / a for a, b in zip(alone, with_it, strict=True)])
    rows = [
        ["alone", f"{1e3 * median(alone):.1f}", spread([1e3 * s for s in alone])],
        [f"beside an evaluation (nice {NICE})", f"{1e3 * median(with_it):.1f}", spread([1e3 * s for s in with_it])],
    ]
    lines = [f"## Training beside an evaluation on the same {cores()} cores: tiny, batch 32", ""]
    lines += [table(("steps", "ms a step", "rounds"), rows), "", f"- {slower:.2f} times as long"]
    return "\n".join(lines)


PARTS: dict[str, Callable[[Plan], str]] = {"features": features, "memory": memory, "whole": whole, "beside": beside}


if __name__ == "__main__":
    raise SystemExit(main())
