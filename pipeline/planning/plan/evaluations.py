"""What evaluations take: how many, of how many images, in what time, and their share of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import AutoencoderConfig, RunConfig, TrainConfig
from pipeline.data.format.contract import Contract
from pipeline.planning.evaluation import evaluation_in_training
from pipeline.planning.first_stage import autoencoder_cost
from pipeline.planning.fit import LEARNED
from pipeline.planning.memory import Precision
from pipeline.planning.parts import Cost
from pipeline.planning.plan.figures import Basis, Figure
from pipeline.planning.plan.job import FROZEN, Job
from pipeline.planning.plan.networks import Encoders, features_cost
from pipeline.planning.plan.sections import Section
from pipeline.planning.plan.speeds import Speeds


@dataclass(frozen=True)
class Looks:
    """How often a run looks at its weights. evaluations: images of each. losses: number of measurements of the
    validation loss, each of `loss_images` records."""

    evaluations: tuple[int, ...]
    losses: int
    loss_images: int

    @property
    def images(self) -> int:
        return sum(self.evaluations)


def looks(config: RunConfig) -> Looks:
    """Of a run that nothing stops: before training, at or after each multiple of eval.every, and at the end."""
    if not config.data.val:
        return Looks((), 0, 0)
    batch, settings = config.optim.batch, config.eval
    end = -(-config.samples // batch) * batch
    between = 0
    if settings.every:
        last = end // settings.every
        between = last - (1 if last and -(-last * settings.every // batch) * batch >= end else 0)
    counts = (settings.images,) * (1 + between) + (settings.final_images or settings.images,)
    if not isinstance(config, TrainConfig) or not config.eval.loss_images:
        return Looks(counts, 0, 0)
    every = config.eval.loss_every or config.checkpoint.every
    number = end // every + (1 if end % every else 0)
    return Looks(counts, number, config.eval.loss_images)


def passes(config: TrainConfig) -> float:
    """Predictions of the network for one image. With guidance each step has two, of which an interval of guidance saves
    some: then this is the most."""
    sampler = config.eval.sampler
    steps = 2 * sampler.steps - 1 if sampler.sampler == "heun" else sampler.steps
    return steps * (1.0 if sampler.guidance == 1 else 2.0)


def precision_of(job: Job) -> Precision:
    """Precision in which evaluations predict: of images that are sampled on a GPU, bf16 unless fp32 is asked for."""
    config = job.config
    sampled = isinstance(config, TrainConfig) and config.task.draws and config.eval.precision != "fp32"
    return "bf16" if sampled and job.machines.gpu else "fp32"


def prediction_cost(job: Job, images: int) -> tuple[Cost, Cost]:
    """(a prediction of what is trained, what runs once before them) for so many images. Of an autoencoder, a whole
    reconstruction; of others, once, what a task learns beside the network, and the text tower."""
    if isinstance(job.config, AutoencoderConfig):
        f = job.config.autoencoder.downsampling
        height, width = (side // f * f for side in job.sides)
        return autoencoder_cost(job.config.autoencoder, images, height, width), Cost(())
    cost = job.cost(images)
    once = tuple(part for part in cost.parts if part.name.startswith((LEARNED, FROZEN)))
    return replace(cost, parts=tuple(part for part in cost.parts if part not in once)), Cost(once)


def evaluations_section(
    job: Job, speeds: Speeds, training_s: float, contract: Contract, encoders: Encoders | None
) -> Section | None:
    """The figures of evaluations; None of a run without any. training_s: seconds of all steps. contract: of the cache.
    encoders: that decode pictures; None = none are needed."""
    config, machines = job.config, job.machines
    found = looks(config)
    if not found.evaluations:
        return None
    batch, each = 32, 1.0
    decoder: Cost | None = None
    if isinstance(config, AutoencoderConfig):
        batch, how = config.eval.batch, "a reconstruction of each"
    elif isinstance(config, TrainConfig) and config.task.draws:
        sampler = config.eval.sampler
        batch, each = sampler.batch, passes(config)
        decoder = encoders.decoder(contract, batch) if encoders else None
        most = "at most " if sampler.guidance_low or sampler.guidance_high else ""
        how = f"{most}{each:g} predictions of each ({sampler.sampler}, {sampler.steps} steps), then decoded"
    else:
        how = "a prediction of each"
    beside: tuple[Cost, ...] = (features_cost(config.eval.features, batch),) if config.eval.reference else ()
    network, once = prediction_cost(job, batch)
    beside += (once,) if once.parts else ()
    rate = speeds.predicting(
        network, batch, machines, passes=each, decoder=decoder, beside=beside, precision=precision_of(job)
    )
    spent = found.images / (rate.per_s * machines.world)
    basis: Basis = "calibrated" if rate.basis == "calibrated" else "arithmetic"
    times = f"{len(found.evaluations)} evaluations: before, after and every {config.eval.every:,} samples"
    if not config.eval.every:
        times = "2 evaluations: before and after training"
    figures = [
        Figure("evaluations", len(found.evaluations), "", "arithmetic", times),
        Figure("images of evaluations", found.images, "images", "arithmetic", f"eval.images={config.eval.images:,}"),
        Figure("images/s of a rank in them", rate.per_s, "images/s", rate.basis, f"{how}; {rate.where}"),
        Figure("seconds of the first", found.evaluations[0] / (rate.per_s * machines.world), "s", basis, how),
        Figure("hours of evaluations", spent / 3600, "hours", basis, "images / images/s, without start-up and figures"),
    ]
    losses = 0.0
    if found.losses:
        forward = speeds.predicting(job.cost(job.micro), job.micro, machines)
        losses = found.losses * found.loss_images / (forward.per_s * machines.world)
        where = f"{found.losses} times {found.loss_images} records of data.val"
        figures.append(Figure("hours of validation losses", losses / 3600, "hours", basis, where))
    beside_training = config.eval.where == "job"
    notes = [] if config.eval.every or beside_training else ["eval.every=N would show how training goes on"]
    needed = evaluation_in_training(
        config,
        contract,
        encoders,
        precision=job.precision(),
        world=machines.world,
        sides=job.sides,
        drawn=precision_of(job),
    )
    if needed is not None:
        what = f"while a batch is {needed.largest}; the training state {'is elsewhere' if beside_training else 'stays'}"
        figures.append(Figure("memory of a rank in them", needed.peak, "bytes", "arithmetic", what))
        if machines.limit_gb and needed.peak > machines.limit_gb * 1e9:
            notes.append(
                f"an evaluation DOES NOT FIT {machines.limit_gb:g} GB: lower eval.sampler.batch (of an autoencoder "
                "eval.batch), or set eval.where=job"
            )
    waits = losses + (0.0 if beside_training else spent)
    share = waits / (training_s + waits) if training_s + waits else 0.0
    where = "in a process beside training, which does not wait" if beside_training else "training waits for them"
    figures.append(Figure("share of the run", share, "share", basis, where))
    return Section("evaluations", tuple(figures), tuple(notes))


def waiting_seconds(section: Section | None, where: str) -> float:
    """Seconds that training waits for its evaluations. where: eval.where."""
    if section is None:
        return 0.0
    hours = [figure.value for figure in section.figures if figure.name == "hours of validation losses"]
    if where == "train":
        hours += [figure.value for figure in section.figures if figure.name == "hours of evaluations"]
    return 3600 * sum(hours)
