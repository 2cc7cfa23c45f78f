"""Times the sides of `benchmarks.autoencoder` in turns, or measures the memory of one side, in a process of its own:
`python -m benchmarks.first_stage.measured ORDER`."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from benchmarks.first_stage.sides import MAKERS, Side, Work, disagreement, random_perceptual
from pipeline.config import FirstStageConfig, FirstStageLossConfig, GanConfig
from pipeline.config.loading.merge import from_dict
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from pipeline.distributed.place import cores
from pipeline.distributed.world import World
from pipeline.errors import WeightsError
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.perceptual.loaded import load_perceptual
from pipeline.models.perceptual.network import Perceptual

WARM = 2  # steps of each side before any is timed
MEMORY_STEPS = 4


@dataclass(frozen=True)
class Order:
    """What to do. stage, gan, loss: configurations as dicts. perceptual: alex, vgg or none. sides: names in MAKERS, one
    for work="memory". out: file of results."""

    work: Literal["time", "memory"]
    stage: dict[str, Any]
    gan: dict[str, Any]
    loss: dict[str, Any]
    batch: int
    side: int
    cache: str
    precision: Literal["fp32", "bf16"]
    perceptual: str
    device: Literal["cpu", "cuda"]
    threads: int
    sides: tuple[str, ...]
    rounds: int
    steps: int
    out: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def work_of(order: Order, device: torch.device) -> tuple[Work, str]:
    """The work of both sides, and what its perceptual weights are."""
    perceptual, weights = perceptual_of(order.perceptual)
    return Work(
        from_dict(FirstStageConfig, order.stage),
        from_dict(GanConfig, order.gan),
        from_dict(FirstStageLossConfig, order.loss),
        order.batch,
        order.side,
        order.cache,
        order.precision,
        None if perceptual is None else perceptual.to(device),
    ), weights


def perceptual_of(kind: str) -> tuple[Perceptual | None, str]:
    """st-LPIPS with the package's weights where it is installed, else with random ones; and which of the two."""
    if kind == "none":
        return None, "none"
    try:
        return load_perceptual(f"st-{kind}"), "the package's weights"
    except WeightsError:
        return random_perceptual(cast(Any, kind)), "random weights"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(order: Order, world: World) -> dict[str, Any]:
    """Seconds of each step of each side, a list for each round, and of processor time."""
    work, weights = work_of(order, world.device)
    found: dict[str, Any] = {"perceptual": weights, "disagreement": disagreement(work), "sides": {}}
    sides: dict[str, Side] = {name: MAKERS[name](work, world) for name in order.sides}
    for name, side in sides.items():
        for _ in range(WARM):
            side.step()
        found["sides"][name] = {"rounds": [], "cpu": [], "images": side.images, "read": side.read}
    torch.set_num_threads(order.threads or cores())  # building a side may have changed it
    for number in range(order.rounds):
        names = list(sides)
        for name in names if number % 2 == 0 else reversed(names):
            seconds, cpu = [], []
            for _ in range(order.steps):
                synchronize(world.device)
                began, cpu_began = time.perf_counter(), time.process_time()
                sides[name].step()
                synchronize(world.device)
                seconds.append(time.perf_counter() - began)
                cpu.append(time.process_time() - cpu_began)
            found["sides"][name]["rounds"].append(seconds)
            found["sides"][name]["cpu"] += cpu
    for side in sides.values():
        side.close()
    return found


def memory(order: Order, world: World) -> dict[str, Any]:
    """Peak memory in bytes of one side: of its networks, their state and a step, beyond what the process has before
    it builds them."""
    work, _ = work_of(order, world.device)
    _import_all()
    before = _resident("VmRSS") if world.device.type == "cpu" else torch.cuda.memory_allocated()
    if world.device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    else:
        torch.cuda.reset_peak_memory_stats()
    side = MAKERS[order.sides[0]](work, world)
    torch.set_num_threads(order.threads or cores())
    for _ in range(MEMORY_STEPS):
        side.step()
    peak = _resident("VmHWM") if world.device.type == "cpu" else torch.cuda.max_memory_allocated()
    side.close()
    return {"bytes": peak - before}


def _import_all() -> None:
    """Import what either side imports, so that the memory of packages counts on neither."""
    declare_torchvision_ops()
    importlib.import_module("deepspeed")
    importlib.import_module("accelerate")
    importlib.import_module("diffusers.training_utils")
    packages = importlib.import_module("pipeline.models.encoders.packages")
    assert packages.AutoencoderKL and packages.VQModel


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def main(arguments: Sequence[str]) -> int:
    """Do what the order says."""
    tree = json.loads(arguments[0])
    order = Order(**{**tree, "sides": tuple(tree["sides"])})
    world = distributed.start(order.device, order.threads)
    result = {"time": timed, "memory": memory}[order.work](order, world)
    Path(order.out).write_text(json.dumps(result), encoding="utf-8")
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
