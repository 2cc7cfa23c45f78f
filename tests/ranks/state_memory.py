"""Ranks that measure memory: bytes of weights, gradients, optimizer and EMA that a rank holds, by engine.

`python -m ranks.state_memory FOLDER`, started by pipeline.distributed.ranks. Each rank writes FOLDER/WORLD-RANK.json.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import DeepSpeedConfig, EmaConfig, OptimConfig, TrainConfig
from pipeline.distributed import world as distributed
from pipeline.distributed.exits import leave
from pipeline.distributed.world import World
from pipeline.training.ema import Ema
from pipeline.training.engines.choose import make_engine

WIDTH = 512
LAYERS = 6
KINDS: tuple[tuple[str, Any, Any], ...] = (
    ("torch", "fp32", {"engine": "torch", "stage": 0}),
    *((f"zero{stage}", "fp32", {"stage": stage}) for stage in range(4)),
    # Stage 1 last, as it leaves objects that are not collected.
    *((f"zero{stage}", "bf16", {"stage": stage}) for stage in (3, 2, 1)),
)


def tensor_bytes() -> int:
    """Bytes of all tensors of this process that came after its imports, with each storage counted once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # visiting every object touches deprecated attributes
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(world: World) -> dict[str, Any]:
    """By engine and precision: bytes in a step before the optimizer runs, and between steps; also the parameter
    count."""
    figures: dict[str, Any] = {"parameters": LAYERS * WIDTH * WIDTH}
    for name, precision, settings in KINDS:
        if name == "torch" and world.size > 1:
            continue
        bytes_before = tensor_bytes()
        module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        config = TrainConfig(
            run="unused",
            precision=precision,
            device="cpu",
            optim=OptimConfig(batch=2 * world.size),
            deepspeed=DeepSpeedConfig(**settings),
        )
        engine = make_engine(module, config, world)
        del module
        ema = Ema(EmaConfig(), [fragment.view for fragment in engine.weights()])
        for step in range(2):
            x = torch.ones(2, WIDTH, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            engine.backward(engine(x).float().square().mean())
            del x
            norms = engine.grad_norms()
            stepping = tensor_bytes() - bytes_before
            engine.step(1e-4, norms)
            ema.update(2 * (step + 1), 2)
        figures[f"{name} {precision}"] = [stepping, tensor_bytes() - bytes_before]
        engine.destroy()
        del engine, ema
    return figures


def main(folder: Path) -> int:
    world = distributed.start("cpu", threads=1)
    gc.freeze()  # what was imported is passed over
    figures = measure(world)
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(figures))
    distributed.stop(world)
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
