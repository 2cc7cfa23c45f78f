"""One rank of `benchmarks.trainer`, started by run_local: `python -m benchmarks.training.trainer_side ORDER`.

Rank 0 writes what it measured to the order's file.
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
    """What ranks are asked to do. work: "time" sides in turns, or count the "traffic" of the ZeRO stages. latents: a
    Latents as a dict. batches: global, by the name of what is timed. saves: whether ours begins a commit in every
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
    found: dict[str, Any] = {name: {"rounds": [], "saved_rounds": [], "writes": []} for name in sides}
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
                found[name]["writes"].append([write_s, size])
            found[name]["saved_rounds" if saves else "rounds"].append(seconds)
    for name, side in sides.items():
        found[name] |= {"ema": median(side.ema_s) if side.ema_s else 0.0, "parameters": side.parameters}
        side.close()
    return found


def traffic(order: Order, world: World) -> dict[str, Any]:
    """Bytes that this rank sends in a step, by ZeRO stage and collective."""
    model, latents = from_dict(ModelConfig, order.model), Latents(**order.latents)
    found: dict[str, Any] = {}
    with counting(world.size) as sent:
        for stage in (0, 1, 2, 3):
            settings = DeepSpeedConfig(stage=cast(Any, stage))
            side = Ours(model, latents, order.batches["ours"], world, order.cache, settings)
            for _ in range(WARM):
                side.step()
            sent.clear()
            for _ in range(order.steps):
                side.step()
            found[str(stage)] = {name: count / order.steps for name, count in sent.items()}
            found["parameters"] = side.parameters
            side.close()
    return found


def main(arguments: Sequence[str]) -> int:
    """A rank. The threads are those of OMP_NUM_THREADS, which the launcher sets."""
    order = Order(**json.loads(arguments[0]))
    world = distributed.start("cpu")
    found = {"time": timed, "traffic": traffic}[order.work](order, world)
    if world.rank == 0:
        Path(order.out).write_text(json.dumps(found))
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
