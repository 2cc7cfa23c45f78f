"""What evaluations take: how many, of how many images, in what time, and their share of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import AutoencoderConfig, PlanConfig, RunConfig, TrainConfig
from pipeline.config.loading.load import load
from pipeline.data.format.contract import Contract
from pipeline.planning.evaluation import evaluation_in_training
from pipeline.planning.first_stage import autoencoder_cost
from pipeline.planning.fit import LEARNED
from pipeline.planning.memory import Precision
from pipeline.planning.parts import Cost
from pipeline.planning.plan.choices import ROOM
from pipeline.planning.plan.figures import Basis, Figure
from pipeline.planning.plan.job import FROZEN, Job, Machines
from pipeline.planning.plan.kept import events
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
    between = events(end, settings.every, batch) - 1
    counts = (settings.images,) * (1 + between) + (settings.final_images or settings.images,)
    if not isinstance(config, TrainConfig) or not config.eval.loss_images:
        return Looks(counts, 0, 0)
    every = config.eval.loss_every or config.checkpoint.every
    return Looks(counts, events(end, every, batch), config.eval.loss_images)


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


def machines_of(job: Job) -> Machines:
    """The machines that evaluate: those of training, or with eval.where=job one process of the same machine, or those
    of a job on eval.cluster. Raises ConfigError for a cluster that is not known."""
    settings, machines = job.config.eval, job.machines
    if settings.where == "train":
        return machines
    if not settings.cluster:
        return replace(machines, nodes=1, ranks=1)
    config: PlanConfig = load("plan", [f"cluster={settings.cluster}"])
    cluster = config.cluster
    gpu = (cluster.gpu_type or machines.gpu) if cluster.gpus else ""
    return Machines(ranks=cluster.processes, gpu=gpu, memory_gb=cluster.gpu_memory_gb, threads=cluster.cpus)


def slowest(images: int, batch: int, ranks: int) -> int:
    """Images of the rank that has most, where ranks take whole batches in turn (evaluation/validation.py Share)."""
    batches = -(-images // batch)
    own = -(-batches // ranks) * batch
    spare = batches * batch - images  # of the last batch
    return own - spare if (batches - 1) % ranks == 0 else own


def evaluations_section(
    job: Job, speeds: Speeds, training_s: float, contract: Contract, encoders: Encoders | None
) -> Section | None:
    """The figures of evaluations; None of a run without any. training_s: seconds of all steps. contract: of the cache.
    encoders: that decode pictures; None = none are needed."""
    config = job.config
    found = looks(config)
    if not found.evaluations:
        return None
    machines = machines_of(job)
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
    if isinstance(config, AutoencoderConfig):
        network, decoder = Cost(()), network  # layers of an autoencoder, which have a time of their own
    rate = speeds.predicting(
        network, batch, machines, passes=each, decoder=decoder, beside=beside, precision=precision_of(job)
    )
    spent = sum(slowest(images, batch, machines.world) for images in found.evaluations) / rate.per_s
    first = slowest(found.evaluations[0], batch, machines.world)
    basis: Basis = "calibrated" if rate.basis == "calibrated" else "arithmetic"
    hours_where = "whole batches of the slowest rank, without start-up and figures"
    times = f"{len(found.evaluations)} evaluations: before, after and every {config.eval.every:,} samples"
    if not config.eval.every:
        times = "2 evaluations: before and after training"
    figures = [
        Figure("evaluations", len(found.evaluations), "", "arithmetic", times),
        Figure("images of evaluations", found.images, "images", "arithmetic", f"eval.images={config.eval.images:,}"),
        Figure("images/s of a rank in them", rate.per_s, "images/s", rate.basis, f"{how}; {rate.where}"),
        Figure("seconds of the first", first / rate.per_s, "s", basis, f"{first:,} images of the rank with most"),
        Figure("hours of evaluations", spent / 3600, "hours", basis, hours_where),
    ]
    losses = 0.0
    if found.losses:
        forward = speeds.predicting(job.cost(job.micro), job.micro, job.machines, precision=job.passes())
        losses = found.losses * found.loss_images / (forward.per_s * job.machines.world)
        basis_of_losses: Basis = "calibrated" if forward.basis == "calibrated" else "arithmetic"
        where = f"{found.losses} times {found.loss_images} records of data.val"
        figures.append(Figure("hours of validation losses", losses / 3600, "hours", basis_of_losses, where))
    beside_training = config.eval.where == "job"
    notes = [] if config.eval.every or beside_training else ["eval.every=N would show how training goes on"]
    needed = evaluation_in_training(
        config,
        contract,
        encoders,
        precision=job.precision(),
        world=job.machines.world,
        sides=job.sides,
        drawn=precision_of(job),
    )
    if needed is not None:
        state = "the training state stays"
        if beside_training:
            on = f"elsewhere (eval.cluster={config.eval.cluster})" if config.eval.cluster else "on the same machine"
            state = f"the training state is {on}, and not counted"
        what = f"while a batch is {needed.largest}; {state}"
        figures.append(Figure("memory of a rank in them", needed.peak, "bytes", "arithmetic", what))
        if machines.limit_gb and needed.peak > ROOM * machines.limit_gb * 1e9:
            notes.append(
                f"an evaluation DOES NOT FIT {ROOM:.0%} of the {machines.limit_gb:g} GB: lower {needed.batch}, or set "
                "eval.where=job with eval.cluster=NAME"
            )
    waits = losses + (0.0 if beside_training else spent)
    share = waits / (training_s + waits) if training_s + waits else 0.0
    where = "in a process beside training, which does not wait" if beside_training else "training waits for them"
    figures.append(Figure("share of the run", share, "share", basis, where))
    return Section("evaluations", tuple(figures), tuple(notes))


def waited(section: Section | None, where: str) -> list[Figure]:
    """The hours that training waits for its evaluations. where: eval.where."""
    names = ["hours of validation losses", *(["hours of evaluations"] if where == "train" else [])]
    return [figure for figure in section.figures if figure.name in names] if section else []
