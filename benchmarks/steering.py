"""How fast images are sampled that begin from others, keep a region of them, or follow a guide, beside plain sampling.

.venv/bin/python -m benchmarks.steering run=RUN val=CACHE [classifier=RUN] [KEY=VALUE ...] [--write]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.encoding.presets import changed
from benchmarks.machine import device_slug, figure, keep, machine, median, spread, table
from pipeline import eval as eval_verb
from pipeline.config import DataConfig, EvalRunConfig, GuideConfig
from pipeline.config.model import SamplerName
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.exits import guarded
from pipeline.distributed.place import cores
from pipeline.distributed.world import pick_device
from pipeline.errors import ConfigError
from pipeline.inference.pictures import conditionings, draw

EPILOG = """\
keys: run=RUN val=CACHE (with masks, captions and classes, of which cases=... needs some) classifier=RUN (for that
case) cases=plain,start,keep,image,clip,classifier sampler=dpmpp_2m steps=12 batch=16 rounds=3 guidance=1 cutouts=0
threads=0 (all cores)

Each case draws one batch as `latentmill eval` does, from what its records give to uint8 pictures, decoded. start takes
all steps, so that what it adds is seen. Rounds take turns in one process.
"""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    run: str = ""
    val: str = ""
    classifier: str = ""
    cases: str = "plain,start,keep,image,clip,classifier"
    sampler: SamplerName = "dpmpp_2m"
    steps: int = 12
    batch: int = 16
    rounds: int = 3
    guidance: float = 1.0
    cutouts: int = 0
    threads: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steering",
        description="How fast images are sampled that something steers, beside plain sampling.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results/")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    return guarded("benchmarks.steering", lambda: run(changed(Plan(), options.overrides), write=options.write))


def run(plan: Plan, *, write: bool) -> int:
    """Measure and print. Raises ConfigError."""
    threads, device = plan.threads or cores(), pick_device("auto")
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_memory()
    head = machine(device, threads)  # with the load before the first round
    sides = {name: side(config_of(name, plan)) for name in plan.cases.split(",")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name, draw_batch in sides.items():  # the first of each makes what later ones find
        draw_batch(1)
        print(f"{name}: ready", file=sys.stderr, flush=True)
    for _ in range(plan.rounds):
        for name, draw_batch in sides.items():
            began = time.perf_counter()
            draw_batch(plan.steps)
            seconds[name].append(time.perf_counter() - began)
    keys = f"cases={plan.cases} sampler={plan.sampler} steps={plan.steps} batch={plan.batch} rounds={plan.rounds}"
    words = f"{keys} guidance={plan.guidance:g} cutouts={plan.cutouts}"
    text = "\n".join(
        [f"# python -m benchmarks.steering {words}", "", *head, "", report(seconds, plan.batch)],
    )
    print(text)
    if write:
        path = keep(f"steering-{device_slug(device)}", f"{text}\n")
        print(f"written to benchmarks/results/{path.name}", file=sys.stderr)
    return 0


def config_of(name: str, plan: Plan) -> EvalRunConfig:
    """The evaluation of one case. Raises ConfigError."""
    if not (plan.run and plan.val):
        raise ConfigError("run= and val= are missing: a run, and a cache of which images are given something")
    if name == "classifier" and not plan.classifier:
        raise ConfigError("the case classifier needs classifier=RUN; leave it out of cases= otherwise")
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "start": {"strength": 1.0},
        "keep": {"keep": True},
        "image": {"guide": GuideConfig(image=2.0)},
        "clip": {"guide": GuideConfig(clip=1.0, cutouts=plan.cutouts)},
        "classifier": {"guide": GuideConfig(classifier=4.0, run=plan.classifier)},
    }
    if name not in changes:
        raise ConfigError(f"cases={plan.cases}: no case {name}; choose of {', '.join(changes)}")
    return EvalRunConfig(
        run=plan.run,
        data=DataConfig(val=plan.val),
        images=max(plan.batch, 2),
        guidance=(plan.guidance,),
        sampler=(plan.sampler,),
        steps=(plan.steps,),
        batch=plan.batch,
        **changes[name],
    )


def side(config: EvalRunConfig) -> Callable[[int], object]:
    """A function that draws one batch of an evaluation in so many steps."""
    trained, evaluator, denoiser, _ = eval_verb.prepare(config, measured=False)
    (settings,), device, numbers = eval_verb.settings(config), evaluator.world.device, list(range(config.batch))

    def draw_batch(steps: int) -> object:
        given = evaluator.judging.given(numbers, config.images)
        hooks = evaluator.steering.hooks(numbers, evaluator.steering.given(numbers, given, config.images))
        batch = denoiser.task.prepare(
            evaluator.judging.batch(numbers, config.images, device),
            evaluator.seed,
            torch.tensor(numbers, device=device),
            training=False,
        )
        sampler = replace(settings, steps=steps)
        conditioning, null = conditionings(denoiser, batch, sampler)
        stage, shape = evaluator.first_stage, trained.contract.latent_shape
        diffusion, seed = evaluator.diffusion, evaluator.seed
        return draw(denoiser, stage, diffusion, sampler, conditioning, numbers, seed, shape, device, null, hooks)

    return draw_batch


def report(seconds: dict[str, list[float]], batch: int) -> str:
    """A row for each case: images/s, their spread over rounds, and how much longer than plain sampling it takes, the
    middle of the rounds in which both took turns."""
    plain = seconds.get("plain")
    rows = [
        [
            name,
            figure(median([batch / s for s in times])),
            spread([batch / s for s in times]),
            f"{median([s / p for s, p in zip(times, plain, strict=True)]):.2f}" if plain else "",
        ]
        for name, times in seconds.items()
    ]
    return table(["images are given", "images/s", "rounds", "time, plain = 1"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
