"""The commands of the study of latent scales, in order. All but two kinds are latentmill's own verbs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.compression.runner import Step
from benchmarks.latent_scale.plan import BETAS, Arm, Plan

SHARD = 1000
"""Images per shard, as synth writes them."""
RATE, DRAWN = 200.0, 60.0
"""Images/s of training, and maps/s of drawing and judging, on 2 cores of an AMD EPYC (Zen 4): guesses for `--list`."""
START_S = 12.0
"""Start of a command."""


class Runs(Protocol):
    """Runs steps, or lists them."""

    def step(self, step: Step) -> bool: ...


@dataclass(frozen=True)
class Places:
    """Where everything of a study lies."""

    dest: Path

    def shapes(self, part: str) -> Path:
        return self.dest / "shapes" / part

    def stage(self, arm: Arm) -> Path:
        """The autoencoder's folder. Arms of one factor share it."""
        return self.dest / "stages" / f"x{arm.factor:g}"

    def cache(self, arm: Arm, part: str) -> Path:
        return self.dest / "caches" / f"x{arm.factor:g}-{part}"

    def run(self, arm: Arm, seed: int) -> Path:
        return self.dest / "runs" / f"{arm.name.replace(' ', '-')}-seed{seed}"

    def measured(self, arm: Arm, seed: int) -> Path:
        """Figures of a run's pictures, and some of the pictures."""
        run = self.run(arm, seed)
        return run.with_name(f"{run.name}-measured")


@dataclass
class Study:
    """The study's plan, places and what runs its steps."""

    plan: Plan
    places: Places
    runner: Runs

    def all(self) -> None:
        """Every step. The runs of the first seed come first; those of later seeds are left out where no time is
        left."""
        for step in self.data():
            self.runner.step(step)
        for seed in self.plan.seeds:
            for arm in self.plan.chosen:
                if self.runner.step(self.training(arm, seed)):
                    self.runner.step(self.measurement(arm, seed))

    def data(self) -> Iterator[Step]:
        """Draw pictures with label maps, and cache them once for each factor."""
        images = {"train": self.plan.train_images, "val": self.plan.maps}
        for seed, (part, count) in enumerate(images.items()):
            folder = self.places.shapes(part)
            words = ("synth", f"dest={folder}", f"images={count}", f"split={part}", f"seed={seed}", "classes=true")
            yield Step(f"draw {count:,} pictures with label maps ({part})", words, folder, 2 + count / 1000)
        for arm in {arm.factor: arm for arm in self.plan.chosen}.values():
            folder, factor = self.places.stage(arm), f"{arm.factor:g}"
            rescaled = ("benchmarks.latent_scale.rescaled", f"factor={factor}", f"dest={folder}")
            yield Step(f"x{factor}: an autoencoder with that scale", rescaled, folder / "config.json", 5)
            for part, count in images.items():
                cache = self.places.cache(arm, part)
                encode = (
                    *("encode", self.source(part, count), f"dest={cache}", "encoders=demo", f"encoders.vae={folder}"),
                    *("text_storage=none", "conditions=[labels]", "decode_in=threads"),
                    f"labels.names={self.places.shapes(part) / 'labels.txt'}",
                )
                yield Step(f"x{factor}: encode {part}", encode, cache / "manifest.json", 8 + count / 300)

    def source(self, part: str, count: int) -> str:
        """The key that names the shards of a part."""
        last = (count - 1) // SHARD
        pattern = f"{{00000..{last:05d}}}.tar" if last else "00000.tar"
        return f"source={self.places.shapes(part) / pattern}"

    def training(self, arm: Arm, seed: int) -> Step:
        """latentmill train: the recipe of captioned shapes by label maps, shorter."""
        plan, run = self.plan, self.places.run(arm, seed)
        words: tuple[str, ...] = (
            *("train", "experiment=shapes_semantic", f"data.train={self.places.cache(arm, 'train')}", f"run={run}"),
            *(f"samples={plan.samples}", f"optim.batch={plan.batch}", f"optim.warmup={min(2000, plan.samples // 5)}"),
            f"ema.half_life={max(plan.batch, plan.samples // 20)}",
            *(f"checkpoint.every={plan.samples // plan.parts}", f"checkpoint.keep={plan.parts}"),
            *(f"deepspeed={plan.engine}", f"launch.processes={plan.processes}", f"precision={plan.precision}"),
            f"launch.threads={plan.threads}",
            *(f"tracking.every={4 * plan.batch}", "tracking.wandb=off", f"seed={seed}"),
            *("encoders=demo", f"encoders.vae={self.places.stage(arm)}"),
        )
        if arm.betas != BETAS:
            words += (f"diffusion.beta_start={arm.betas[0]:g}", f"diffusion.beta_end={arm.betas[1]:g}")
        expected = START_S + plan.samples / RATE
        heading = f"{arm.name}, seed {seed}: train on {plan.samples:,} samples"
        return Step(heading, words, run / "config.yaml", expected, optional=seed != plan.seeds[0])

    def measurement(self, arm: Arm, seed: int) -> Step:
        """Draw pictures of each size, and judge them."""
        plan, dest = self.plan, self.places.measured(arm, seed)
        words = (
            *("benchmarks.latent_scale.measure", f"run={self.places.run(arm, seed)}"),
            *(f"val={self.places.cache(arm, 'val')}", f"at={listed(plan.checkpoints)}", f"maps={plan.maps}"),
            *(f"sides={listed(plan.sides)}", f"large={listed(plan.large)}", f"repeated={plan.repeated}"),
            *(f"walk={plan.walk}", f"sampler={plan.sampler}", f"steps={plan.steps}", f"seed={seed}", f"dest={dest}"),
        )
        rounds = len(plan.points) * len(plan.sides) + len(plan.large)
        expected = START_S + (plan.maps * rounds + 4 * plan.repeated + plan.walk * plan.steps / 2) / DRAWN
        heading = f"{arm.name}, seed {seed}: draw and judge pictures"
        return Step(heading, words, dest / "figures.json", expected)


def listed(numbers: tuple[int, ...]) -> str:
    """1,2,4"""
    return ",".join(map(str, numbers))
