"""From a run, its cache and its machines to a plan: every section, the choice, and the sums over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import AutoencoderConfig, EncodeConfig, EncodersConfig, RunConfig, TrainConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract
from pipeline.planning.plan.choices import Choice, choice, choices, reason, recommended, scales
from pipeline.planning.plan.encoding import Cached, encode_section, hours_of_encode
from pipeline.planning.plan.evaluations import evaluations_section, waited
from pipeline.planning.plan.figures import Basis, Figure
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.kept import storage_section
from pipeline.planning.plan.networks import Encoders
from pipeline.planning.plan.sections import Plan, Section
from pipeline.planning.plan.speeds import Speeds
from pipeline.planning.plan.training import seconds, training_section


@dataclass(frozen=True)
class Asked:
    """What is planned. title: in one line. encode: the configuration of encode. price: of one GPU, or process, for an
    hour; 0 = none."""

    title: str
    job: Job
    cached: Cached
    encode: EncodeConfig
    encoders: Encoders
    price: float = 0.0


def job_of(config: RunConfig, found: Cached, encoders: Encoders, machines: Machines) -> Job:
    """The job of a run on its cache."""
    contract = found.contract
    ids = contract.text is not None and contract.text.storage == "tokens"
    encodes = isinstance(config, TrainConfig) and ids and "text" in config.task.members
    return Job(
        config=config,
        cache=contract,
        machines=machines,
        sides=sides_of(config, contract),
        records=found.records,
        record_bytes=found.record_bytes,
        tower=encoders.tower(1) if encodes else None,
    )


def sides_of(config: RunConfig, contract: Contract) -> tuple[int, int]:
    """(height, width) of the pictures that an autoencoder is trained on; (0, 0) of other runs."""
    if not isinstance(config, AutoencoderConfig):
        return 0, 0
    if config.crop:
        return config.crop, config.crop
    width, height = max(contract.buckets, key=lambda size: size[0] * size[1])
    return height, width


def encoders_of(config: RunConfig, contract: Contract) -> Encoders:
    """The encoders of a cache that is there, by their configurations: those that a run names, else those of the
    contract. Raises ConfigError where nothing says what they are."""
    named = config.encoders if isinstance(config, TrainConfig) else None
    return Encoders.of(named or from_dict(EncodersConfig, contract.encoders), contract)


def plan_of(asked: Asked, speeds: Speeds) -> Plan:
    """The plan. The figures are of the configured ZeRO stage and micro-batch where a step fits the GPU, and else of the
    recommended ones. Raises ConfigError for a GPU that nothing is known of, and where nothing fits
    model.activation_gb."""
    job = asked.job
    found = choices(job, speeds)
    configured = choice(job, speeds)
    best = recommended(found, configured)
    chosen = best if configured.fits is False and best is not None else configured
    trained_s = seconds(job, chosen)
    encode = encode_section(asked.cached, asked.encode, asked.encoders, job.machines, speeds)
    training = training_section(job, chosen, speeds)
    evaluations = evaluations_section(job, speeds, trained_s, asked.cached.contract, asked.encoders)
    cost = job.cost(1)
    total = sum(size.total for size in asked.cached.sizes)
    storage = storage_section(job, cost, total)
    waits = waited(evaluations, job.config.eval.where)
    basis = of_sum([part.basis for part in (training.figure("hours of steps"), *waits) if part is not None])
    run_s = trained_s + sum(3600 * figure.value for figure in waits)
    whole = _whole(asked, run_s, basis, hours_of_encode(encode, job.machines))
    sections = (encode, training, storage, evaluations, whole)
    return Plan(
        title=asked.title,
        sections=tuple(section for section in sections if section is not None),
        choices=found,
        chosen=chosen,
        recommended=best,
        why=reason(best, configured, found, job) if best else _nothing_fits(found, job),
        scales=scales(job, chosen, speeds),
    )


def of_sum(bases: Sequence[Basis]) -> Basis:
    """The basis of a sum: calibrated where all of it is."""
    return "calibrated" if {*bases} == {"calibrated"} else "arithmetic"


def _whole(asked: Asked, run_s: float, basis: Basis, encode: Figure | None) -> Section:
    """Hours, device-hours and price. run_s: of training with what it waits for. encode: hours on the same machines;
    None = nothing is encoded, or it is not known."""
    machines = asked.job.machines
    world, what = machines.world, "GPU" if machines.gpu else "process"
    hours = run_s / 3600
    figures = [
        Figure("hours", hours, "hours", basis, "training with its evaluations; commits are written beside it"),
        Figure("device-hours", hours * world, "hours", basis, f"hours x {world} {what}{_plural(what, world)}"),
    ]
    both = of_sum([basis, encode.basis]) if encode else basis
    if encode is not None:
        spent = (hours + encode.value) * world
        figures.append(replace(encode, name="hours of encoding", where="on the same machines, before"))
        figures.append(Figure("device-hours of both", spent, "hours", both, "encoding and training"))
    if asked.price:
        where = f"price={asked.price:g} for an hour of a {what}"
        figures.append(Figure("price", hours * world * asked.price, "", basis, where))
        if encode is not None:
            paid = (hours + encode.value) * world * asked.price
            figures.append(Figure("price of both", paid, "", both, where))
    notes = ("what jobs wait for in a queue, restarts and failures are not counted",)
    return Section("whole", tuple(figures), notes)


def _plural(noun: str, count: int) -> str:
    return "" if count == 1 else "es" if noun.endswith("s") else "s"


def _nothing_fits(found: tuple[Choice, ...], job: Job) -> str:
    """Why none is recommended."""
    if not job.machines.limit_gb:
        if not job.machines.gpu:
            return "compare the peaks with the machine's memory: without a GPU, none is recommended"
        return "none is recommended, because cluster.gpu_memory_gb would say what fits"
    least = min(found, key=lambda one: one.peak)
    return (
        f"none fits {job.machines.limit_gb:g} GB: {least.words} needs least, {least.peak / 1e9:.3g} GB; set "
        "model.checkpointing=true, bound model.activation_gb, or ask for more ranks"
    )
