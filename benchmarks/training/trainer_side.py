"""One rank of `benchmarks.trainer`, started by run_local: `python -m benchmarks.training.trainer_side ORDER`.

Rank 0 writes its measurements to the order's file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.machine import median
from benchmarks.streaming.latents import Latents
from benchmarks.training.traffic import counting
from benchmarks.training.trainer_peers import MAKERS, Ours, Side
from pipeline.config import DeepSpeedConfig, ModelConfig
from pipeline.config.loading.merge import from_dict
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from pipeline.distributed.world import World

WARM = 5  # steps of each side before any is timed


@dataclass(frozen=True)
class Order:
    """Instructions for the ranks. work: "time" sides in turns, or count the "traffic" of the ZeRO stages. latents: a
    Latents as a dict. batches: global batches by name of the side. saves: whether ours begins a commit in every
    other round."""

    work: Literal["time", "traffic"]
    model: dict[str, Any]
    latents: dict[str, Any]
    cache: str
    batches: dict[str, int]
    sides: dict[str, str]
    rounds: int
    steps: int
    saves: bool
    out: str


def timed(order: Order, world: World) -> dict[str, Any]:
    """Seconds of each step of each side, a list for each round; of ours also those of the rounds that saved."""
    model, latents = from_dict(ModelConfig, order.model), Latents(**order.latents)
    sides: dict[str, Side] = {
        name: MAKERS[kind](model, latents, order.batches[name], world, order.cache)
        for name, kind in order.sides.items()
    }
    for side in sides.values():
        for _ in range(WARM):
            side.step()
        side.ema_s.clear()
    timings: dict[str, Any] = {name: {"rounds": [], "saved_rounds": [], "writes": []} for name in sides}
    for number in range(order.rounds * (2 if order.saves else 1)):
        for name, side in sides.items():
            saves = order.saves and number % 2 == 1 and isinstance(side, Ours)
            if order.saves and number % 2 == 1 and not saves:
                continue
            world.barrier()
            seconds = []
            for step in range(order.steps):
                began = time.perf_counter()
                if saves and step == 0:
                    cast(Ours, side).save()
                side.step()
                seconds.append(time.perf_counter() - began)
            if saves:
                began = time.perf_counter()
                write_s, size = cast(Ours, side).settle()
                seconds[-1] += time.perf_counter() - began
                timings[name]["writes"].append([write_s, size])
            timings[name]["saved_rounds" if saves else "rounds"].append(seconds)
    for name, side in sides.items():
        timings[name] |= {"ema": median(side.ema_s) if side.ema_s else 0.0, "parameters": side.parameters}
        side.close()
    return timings


def traffic(order: Order, world: World) -> dict[str, Any]:
    """Bytes that this rank sends in a step, by ZeRO stage and collective."""
    model, latents = from_dict(ModelConfig, order.model), Latents(**order.latents)
    sent_by_stage: dict[str, Any] = {}
    with counting(world.size) as sent:
        for stage in (0, 1, 2, 3):
            settings = DeepSpeedConfig(stage=cast(Any, stage))
            side = Ours(model, latents, order.batches["ours"], world, order.cache, settings)
            for _ in range(WARM):
                side.step()
            sent.clear()
            for _ in range(order.steps):
                side.step()
            sent_by_stage[str(stage)] = {name: count / order.steps for name, count in sent.items()}
            sent_by_stage["parameters"] = side.parameters
            side.close()
    return sent_by_stage


def main(arguments: Sequence[str]) -> int:
    """Run a rank. The launcher sets its number of threads as OMP_NUM_THREADS."""
    order = Order(**json.loads(arguments[0]))
    world = distributed.start("cpu")
    result = {"time": timed, "traffic": traffic}[order.work](order, world)
    if world.rank == 0:
        Path(order.out).write_text(json.dumps(result))
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
