"""The commands of the compression study, in order. Every one can be run by hand; none is more than latentmill's own
verbs, but for the sampling speed, which benchmarks.compression.speed measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.compression.plan import TEXT_LENGTH, Level, Plan
from benchmarks.compression.runner import Step
from pipeline.config import ModelConfig
from pipeline.errors import RunError
from pipeline.planning.cost import unet_cost
from pipeline.tracking.tracker import METRICS_KEY, parse_lines

SHARD = 1000
"""Images per shard, as synth writes them."""
GUIDED = 1.75
"""Passes of the network for each denoising step with guidance above noise level 1, roughly."""
FASTER = 3.0
"""How much faster an image passes the network than it trains."""
START_S = 12.0
"""Start of a command, and what an evaluation does besides drawing."""


class Runs(Protocol):
    """Runs steps, or lists them."""

    def step(self, step: Step) -> bool: ...


@dataclass(frozen=True)
class Places:
    """Where everything of a study lies."""

    dest: Path

    def shapes(self, part: str) -> Path:
        return self.dest / "shapes" / part

    def cache(self, level: Level, part: str) -> Path:
        return self.dest / "caches" / f"f{level.f}-{part}"

    def reference(self, level: Level) -> Path:
        return self.dest / "references" / f"f{level.f}.safetensors"

    def stage_run(self, level: Level) -> Path:
        return self.dest / "stages" / f"f{level.f}"

    def stage(self, level: Level) -> Path:
        """The exported first stage."""
        return self.dest / "stages" / f"f{level.f}-exported"

    def reconstructions(self, level: Level) -> Path:
        return self.dest / "stages" / f"f{level.f}-figures"

    def run(self, level: Level) -> Path:
        return self.dest / "runs" / f"f{level.f}"

    def speed(self, level: Level) -> Path:
        return self.dest / "runs" / f"f{level.f}-speed.json"

    def probe(self, run: Path) -> Path:
        return run.with_name(f"{run.name}-probe")


@dataclass
class Study:
    """The study's plan, places and what runs its steps. lists: print commands with expected rates instead of running
    them."""

    plan: Plan
    places: Places
    runner: Runs
    lists: bool = False

    def all(self) -> None:
        """Every step. Those of the evaluations come in the order of importance, the same for each f."""
        plan = self.plan
        self._steps(self.shapes())
        pixels, others = plan.levels[0], plan.levels[1:]
        if pixels.f != 1:
            raise RunError("the study begins with f = 1, whose cache the first stages are trained on")
        self._steps(self.caches(pixels))
        self._steps(self.stage_probe(level) for level in others)
        for level in others:
            self._steps(self.stage(level))
            self._steps(self.caches(level))
        self._steps(self.denoiser_probe(level) for level in plan.levels)
        self._steps(self.denoiser(level) for level in plan.levels)
        self._steps(self.evaluation(level, plan.parts, plan.steps) for level in plan.levels)
        for part in sorted(set(plan.points) - {plan.parts}, reverse=True):
            self._steps(self.evaluation(level, part, plan.steps) for level in plan.levels)
        for steps in plan.sweep:
            self._steps(self.evaluation(level, plan.parts, steps) for level in plan.levels)
        self._steps(self.speed(level) for level in plan.levels)

    def _steps(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.runner.step(step)

    # ----------------------------------------------------------------------------------------------------------------
    # Data

    def shapes(self) -> Iterator[Step]:
        """Shards of captioned shapes; those of split val have captions that training never uses."""
        plan = self.plan
        sets = {"train": (plan.train_images, "train"), "val": (plan.val_images, "val")}
        sets["ref"] = (plan.reference_images, "val")
        for number, (part, (images, split)) in enumerate(sets.items()):
            folder = self.places.shapes(part)
            words = ("synth", f"dest={folder}", f"images={images}", f"split={split}", f"seed={plan.seed + number}")
            yield Step(f"Draw {images:,} captioned pictures ({part})", words, folder, 4 + images / 400)

    def source(self, part: str) -> str:
        """The key of encode, verify and reference that names the shards."""
        images = {"train": self.plan.train_images, "val": self.plan.val_images, "ref": self.plan.reference_images}
        last = (images[part] - 1) // SHARD
        pattern = f"{{00000..{last:05d}}}.tar" if last else "00000.tar"
        return f"source={self.places.shapes(part) / pattern}"

    def caches(self, level: Level) -> Iterator[Step]:
        """Encode all parts, prove the cache that is trained on, and measure the real pictures. Statistics of real
        pictures are the same for each f; the file also has the floor of its first stage."""
        plan, places = self.plan, self.places
        images = {"train": plan.train_images, "val": plan.val_images, "ref": plan.reference_images}
        encoders = self.encoders(level)
        pixels = ("encoders=demo", "stored=pixels", "caption_key=txt")
        for part, count in images.items():
            cache = places.cache(level, part)
            words = ("encode", self.source(part), f"dest={cache}", *(encoders or pixels))
            yield Step(f"f = {level.f}: encode {part}", words, cache / "manifest.json", 8 + count / 300)
        report = places.cache(level, "train").with_suffix(".html")
        words = ("verify", f"dataset={places.cache(level, 'train')}", self.source("train"), f"report={report}")
        words += encoders
        words += () if plan.min_psnr == 20 else (f"min_psnr={plan.min_psnr:g}",)
        yield Step(f"f = {level.f}: prove the cache", words, report, 15 + plan.train_images / 2000)
        reference = places.reference(level)
        words = ("reference", f"dataset={places.cache(level, 'ref')}", self.source("ref"), f"dest={reference}")
        words += encoders
        yield Step(f"f = {level.f}: measure the real pictures", words, reference, 12 + plan.reference_images / 80)

    def encoders(self, level: Level) -> tuple[str, ...]:
        """Keys that name the first stage's folder, which caches do not (they hold no place of a machine)."""
        return () if level.f == 1 else ("encoders=demo", f"encoders.vae={self.places.stage(level)}")

    # ----------------------------------------------------------------------------------------------------------------
    # First stages

    def stage_probe(self, level: Level) -> Step:
        """A short run of the first stage, which tells its rate."""
        probe = self.places.probe(self.places.stage_run(level))
        samples = self.plan.stage_batch * self.plan.probe_steps
        words = self.stage_words(level, samples, probe, every=samples)
        heading = f"f = {level.f}: how long a step of the first stage takes"
        return Step(heading, words, probe / METRICS_KEY, START_S + samples / level.stage_rate)

    def stage(self, level: Level) -> Iterator[Step]:
        """Train the first stage for its time, export and measure it."""
        plan, places, pixels = self.plan, self.places, self.plan.levels[0]
        run, probe = places.stage_run(level), places.probe(places.stage_run(level))
        samples = self.samples(probe, plan.stage_seconds, level.stage_rate, plan.stage_batch)
        words = self.stage_words(level, samples, run, every=samples)
        yield Step(
            f"f = {level.f}: train the first stage for {plan.stage_seconds:.0f} s",
            words,
            run / METRICS_KEY,
            START_S + plan.stage_seconds,
        )
        folder, figures = places.stage(level), places.reconstructions(level)
        words = ("export", f"run={run}", f"dest={folder}")
        yield Step(f"f = {level.f}: export the first stage", words, folder / "config.json", START_S + 10)
        words = (
            *("reconstruct", f"dataset={places.cache(pixels, 'val')}", "encoders=demo", f"encoders.vae={folder}"),
            *(f"reference={places.reference(pixels)}", f"images={plan.val_images}", f"dest={figures}"),
        )
        yield Step(f"f = {level.f}: measure its reconstructions", words, figures / "metrics.json", START_S + 15)

    def stage_words(self, level: Level, samples: int, run: Path, every: int) -> tuple[str, ...]:
        """latentmill autoencoder with the losses of conf/experiment/kl_small.yaml. Captioned shapes need neither a
        perceptual distance nor a discriminator."""
        plan = self.plan
        cache = self.places.cache(plan.levels[0], "train")
        return (
            *("autoencoder", f"autoencoder={level.stage}", f"data.train={cache}", f"run={run}"),
            *("loss.l1=0.05", "loss.l2=1", "loss.kl=1e-3", "loss.perceptual=none", "gan.weight=0"),
            *("optim.lr=2e-3", "optim.betas=[0.9,0.99]", "optim.decay=cosine"),
            *self._common(samples, every, plan.stage_batch),
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Denoisers

    def denoiser_probe(self, level: Level) -> Step:
        """A short run of the denoiser of an f, which tells its rate."""
        probe = self.places.probe(self.places.run(level))
        samples = self.plan.batch * self.plan.probe_steps
        words = self.denoiser_words(level, samples, probe, every=samples)
        heading = f"f = {level.f}: how long a step of the denoiser takes"
        return Step(heading, words, probe / METRICS_KEY, START_S + samples / level.rate)

    def denoiser(self, level: Level) -> Step:
        """Train the denoiser of an f for its time."""
        plan, run = self.plan, self.places.run(level)
        probe = self.places.probe(run)
        samples = self.samples(probe, plan.denoiser_seconds, level.rate)
        words = self.denoiser_words(level, samples, run, every=samples // plan.parts)
        heading = f"f = {level.f}: train the denoiser for {plan.denoiser_seconds:.0f} s"
        return Step(heading, words, run / METRICS_KEY, START_S + plan.denoiser_seconds)

    def denoiser_words(self, level: Level, samples: int, run: Path, every: int) -> tuple[str, ...]:
        """latentmill train: the recipe of captioned shapes with the denoiser of this f."""
        config = model_of(level)
        return (
            *("train", "experiment=shapes", f"data.train={self.places.cache(level, 'train')}", f"run={run}"),
            *(f"model.name={config.name}", f"model.channels={config.channels}"),
            *(f"model.multipliers={listed(config.multipliers)}", f"model.attention={listed(config.attention)}"),
            *(f"model.in_channels={level.latent_channels}", f"model.out_channels={level.latent_channels}"),
            *self._common(samples, every, self.plan.batch),
            f"checkpoint.keep={2 * self.plan.parts}",  # a stop adds commits, which push out none
            *self.encoders(level),  # which evaluations load
        )

    def _common(self, samples: int, every: int, batch: int) -> tuple[str, ...]:
        """Keys of both kinds of training. Averages follow the length of the run, so that they are the same share of
        each."""
        plan = self.plan
        return (
            *(f"samples={samples}", f"optim.batch={batch}", f"optim.warmup={min(2000, samples // 5)}"),
            *(f"ema.half_life={max(batch, samples // 20)}", f"checkpoint.every={every}"),
            *(f"deepspeed={plan.engine}", f"launch.processes={plan.processes}", f"precision={plan.precision}"),
            *(f"tracking.every={4 * batch}", "tracking.wandb=off", f"seed={plan.seed}"),
        )

    def samples(self, probe: Path, seconds: float, expected: float, batch: int = 0) -> int:
        """Samples that training takes in that time, a whole number of batches in each part of it. expected: images/s,
        which `--list` goes by. batch: 0 = the denoiser's."""
        rate, unit = expected if self.lists else images_per_s(probe), (batch or self.plan.batch) * self.plan.parts
        return max(1, round(rate * seconds / unit)) * unit

    # ----------------------------------------------------------------------------------------------------------------
    # Evaluations

    def evaluation(self, level: Level, part: int, steps: int) -> Step:
        """latentmill eval of a checkpoint: the same captions and noise numbers for all."""
        plan, places = self.plan, self.places
        probe = places.probe(places.run(level))
        samples = self.samples(probe, plan.denoiser_seconds, level.rate)
        at = samples // plan.parts * part
        words = (
            *("eval", f"run={places.run(level)}", f"at={at}", f"data.val={places.cache(level, 'val')}"),
            *(f"reference={places.reference(level)}", f"images={plan.val_images}", f"sampler={plan.sampler}"),
            *(f"steps={steps}", "guidance=2", "guidance_low=1", f"seed={plan.seed}"),
        )
        rate = FASTER * (level.rate if self.lists else images_per_s(probe))
        expected = START_S + plan.val_images * (GUIDED * steps / rate + 1 / 40)
        heading = f"f = {level.f}: quality after {part}/{plan.parts} of training, {steps} steps"
        return Step(heading, words, places.run(level) / "evals", expected, optional=True)

    def speed(self, level: Level) -> Step:
        """How fast the trained model draws, with each number of steps."""
        plan, places = self.plan, self.places
        steps = sorted({plan.steps, *plan.sweep})
        words = (
            *("benchmarks.compression.speed", f"run={places.run(level)}", f"val={places.cache(level, 'val')}"),
            *(f"sampler={plan.sampler}", f"steps={','.join(map(str, steps))}", f"images={plan.speed_images}"),
            *(f"rounds={plan.speed_rounds}", f"dest={places.speed(level)}"),
        )
        rate = FASTER * (level.rate if self.lists else images_per_s(places.probe(places.run(level))))
        passes = GUIDED * (plan.speed_rounds * sum(steps) + min(steps))
        expected = START_S + plan.speed_images * passes / rate
        return Step(f"f = {level.f}: images/s of drawing", words, places.speed(level), expected, optional=True)


def model_of(level: Level) -> ModelConfig:
    """The denoiser of an f."""
    return ModelConfig(
        name=f"f{level.f}",
        in_channels=level.latent_channels,
        out_channels=level.latent_channels,
        channels=level.channels,
        multipliers=level.multipliers,
        blocks=1,
        attention=level.attention,
        heads=4,
        context_width=128,
        norm_groups=8,
    )


def denoiser_cost(level: Level) -> tuple[int, int]:
    """Parameters of the denoiser, and FLOPs of training it on a picture."""
    cost = unet_cost(model_of(level), 1, level.side, level.side, TEXT_LENGTH)
    return cost.parameters, sum(cost.training_flops().values())


def listed(numbers: tuple[int, ...]) -> str:
    """[1,2,4]"""
    return f"[{','.join(map(str, numbers))}]"


def images_per_s(run: Path) -> float:
    """Images per second of training, by the median of a run's steps but the first few. Raises RunError for a run
    without steps."""
    seconds, batch = step_seconds(run)
    steady = sorted(seconds[min(4, len(seconds) // 2) :])
    return batch / steady[len(steady) // 2]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics in order of time. Raises RunError where there is none of training."""
    path = run / METRICS_KEY
    rows = parse_lines(path.read_bytes())[0] if path.is_file() else []
    if not any(row["kind"] == "train" for row in rows):
        raise RunError(f"{run} has no steps of training in {METRICS_KEY}: delete the folder, and run the study again")
    return rows


def step_seconds(run: Path) -> tuple[list[float], int]:
    """Seconds of each step of a run in order of its samples, and its batch. Of steps that were taken twice, after a
    resume, the later. Raises RunError for a run without steps."""
    steps: dict[int, float] = {}
    last, batch = 0, 0
    for row in rows_of(run):
        if row["kind"] == "start":
            last = int(row["n"])
        if row["kind"] == "train" and (seconds := row.get("steps_s")):
            batch = (int(row["n"]) - last) // len(seconds)
            for i, one in enumerate(seconds, start=1):
                steps[last + i * batch] = one
            last = int(row["n"])
    if not steps:
        raise RunError(f"{run} has no steps of training in {METRICS_KEY}: delete the folder, and run the study again")
    return [steps[n] for n in sorted(steps)], batch
