"""Measures how fast a trained model draws pictures with each number of denoising steps: from text states to uint8
pixels, guidance and the decoder included, as `latentmill sample` and evaluations do it.

    .venv/bin/python -m benchmarks.compression.speed run=RUN val=CACHE sampler=unipc steps=4,8 images=64 dest=FILE
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded


@dataclass(frozen=True)
class Settings:
    """What to measure. steps: numbers of denoising steps, with commas. images: of a batch. rounds: batches with each
    number of steps that are timed, after one that is not."""

    run: str = ""
    val: str = ""
    sampler: str = "unipc"
    steps: str = "8"
    images: int = 64
    rounds: int = 3
    dest: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded("benchmarks.compression.speed", lambda: run(changed(Settings(), words)))


def run(settings: Settings) -> int:
    """Measure, print and store: {"4": images/s, ...}."""
    rates = measure(settings)
    text = json.dumps(rates)
    print(text)
    if settings.dest:
        Path(settings.dest).write_text(text + "\n", encoding="utf-8")
    return 0


def measure(settings: Settings) -> dict[str, float]:
    """Images per second by number of steps: the median of rounds, in which the numbers of steps take turns."""
    import torch

    from benchmarks.machine import median
    from pipeline.config import DataConfig, EvalRunConfig
    from pipeline.distributed.allocator import keep_memory
    from pipeline.distributed.place import cores
    from pipeline.eval import prepare
    from pipeline.eval import settings as samplers_of
    from pipeline.inference.pictures import conditionings, draw

    torch.set_num_threads(cores())
    keep_memory()
    config = EvalRunConfig(
        run=settings.run,
        data=DataConfig(val=settings.val),
        images=settings.images,
        sampler=(settings.sampler,),  # type: ignore[arg-type]
        steps=tuple(map(int, settings.steps.split(","))),
        guidance=(2.0,),
        guidance_low=1.0,
        batch=settings.images,
        device="cpu",
    )
    _, evaluator, denoiser, _ = prepare(replace(config, perceptual="none"), measured=False)
    device, numbers = evaluator.world.device, list(range(settings.images))
    given = evaluator.judging.batch(numbers, settings.images, device)
    batch = denoiser.task.prepare(given, config.seed, torch.tensor(numbers), training=False)
    shape = evaluator.validation.contract.latent_shape
    seconds: dict[str, list[float]] = {}
    samplers = sorted(samplers_of(config), key=lambda one: one.steps)
    for number in range(settings.rounds + 1):
        for sampler in samplers if number else samplers[:1]:
            began = time.perf_counter()
            conditioning, null = conditionings(denoiser, batch, sampler)
            stage, diffusion = evaluator.first_stage, evaluator.diffusion
            draw(denoiser, stage, diffusion, sampler, conditioning, numbers, config.seed, shape, device, null)
            if number:
                seconds.setdefault(str(sampler.steps), []).append(time.perf_counter() - began)
    return {steps: settings.images / median(times) for steps, times in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
