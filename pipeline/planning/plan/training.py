"""What training takes: parameters, arithmetic, speed, what is sent and read, hours, device-hours."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import TrainConfig
from pipeline.planning.fit import LEARNED
from pipeline.planning.parts import Cost
from pipeline.planning.plan.choices import Choice
from pipeline.planning.plan.communication import link_words
from pipeline.planning.plan.figures import Basis, Figure, Rate
from pipeline.planning.plan.job import FROZEN, Job
from pipeline.planning.plan.machines import gpu_of
from pipeline.planning.plan.sections import Section
from pipeline.planning.plan.speeds import Speeds

AMPLIFICATION = 1.03
"""Bytes that all nodes read in an epoch over those that there are: simulated for 512 nodes
(benchmarks/results/order-amd-epyc-2-cores.md)."""
COUNTS = 0.01
"""Share of a step from which on what is sent counts."""


def training_section(job: Job, chosen: Choice, speeds: Speeds) -> Section:
    """The figures of training with the ZeRO stage and micro-batch that were chosen."""
    job = job.of(chosen.stage, chosen.micro_batch)
    rate = speeds.training(job)
    cost = job.cost(1)
    return Section(
        "training",
        (
            *_network(job, cost),
            *_speed(job, cost, chosen, rate),
            *_sent(job, chosen),
            *_read(job, chosen),
            *_whole(job, chosen, rate),
        ),
        tuple(_notes(job, chosen)),
    )


def images_per_second(job: Job, chosen: Choice) -> float:
    """Images that all ranks train on in a second."""
    return job.config.optim.batch / chosen.step_s


def seconds(job: Job, chosen: Choice) -> float:
    """Seconds of all steps of the run."""
    return job.samples / images_per_second(job, chosen) * job.lighter(job.cost(1))


def _network(job: Job, cost: Cost) -> list[Figure]:
    beside = sum(part.parameters for part in cost.parts if part.name.startswith(LEARNED))
    judge = sum(part.parameters for part in cost.parts if part.name.startswith("discriminator"))
    where = "counted from the configuration (planning/cost.py)"
    figures = [Figure("parameters", cost.parameters, "", "arithmetic", where)]
    if beside:
        figures.append(Figure("of them the task's own", beside, "", "arithmetic", "planning/conditioning.py"))
    if judge:
        figures.append(Figure("of them the discriminator's", judge, "", "arithmetic", "planning/first_stage.py"))
    if frozen := sum(sum(layer.flops for layer in part.layers) for part in cost.parts if part.name.startswith(FROZEN)):
        figures.append(
            Figure("FLOPs of an image in the text tower", frozen, "FLOP", "arithmetic", "the cache holds ids alone")
        )
    flops = job.image_flops(cost)
    figures.append(Figure("FLOPs of an image", flops, "FLOP", "arithmetic", f"forward and backward pass, {where}"))
    return figures


def _speed(job: Job, cost: Cost, chosen: Choice, rate: Rate) -> list[Figure]:
    per_s = images_per_second(job, chosen)
    gpu = gpu_of(job.machines.gpu) if job.machines.gpu else None
    peak = job.config.tracking.peak_tflops * 1e12 or (gpu.peak_tflops * 1e12 if gpu else 0.0)
    basis = _basis(chosen, rate)
    figures = [
        Figure("images/s of a rank that sends nothing", rate.per_s, "images/s", rate.basis, rate.where),
        Figure("images/s", per_s, "images/s", basis, f"{job.machines.world} ranks of that, with what they send"),
        Figure("seconds of a step", chosen.step_s, "s", basis, f"{job.config.optim.batch:,} images"),
    ]
    if chosen.send_s >= COUNTS * chosen.step_s:
        best = job.config.optim.batch / max(chosen.compute_s, chosen.send_s)
        where = "if sending and computing overlapped wholly, which no plan can promise"
        figures.append(Figure("images/s at best", best, "images/s", "arithmetic", where))
    if peak:
        used = trained_flops(cost) * per_s / job.machines.world / peak
        where = f"of {peak / 1e12:g} TFLOP/s, of what is trained, without recomputation"
        figures.append(Figure("MFU", used, "share", basis, where))
    return figures


def trained_flops(cost: Cost) -> int:
    """FLOPs of a step, without those of networks that run in it and are not trained. cost: of the steps that images/s
    is of, an autoencoder's heaviest."""
    trained = replace(cost, parts=tuple(part for part in cost.parts if not part.name.startswith(FROZEN)))
    return sum(trained.training_flops().values())


def _basis(chosen: Choice, rate: Rate) -> Basis:
    """The basis of a step's time: where what is sent counts, an assumed bandwidth."""
    return rate.basis if chosen.send_s < COUNTS * chosen.step_s else "arithmetic"


def _sent(job: Job, chosen: Choice) -> list[Figure]:
    if job.machines.world == 1:
        return []
    links = link_words(job.machines)
    return [
        Figure(
            "bytes that a rank sends in a step",
            chosen.sent,
            "bytes",
            "arithmetic",
            f"ZeRO {chosen.stage}, {job.share // chosen.micro_batch} micro-batches (planning/plan/communication.py)",
        ),
        Figure("seconds of a step in which it sends", chosen.send_s, "s", "arithmetic", f"{links}; nothing overlaps"),
    ]


def _read(job: Job, chosen: Choice) -> list[Figure]:
    if not job.record_bytes:
        return []
    of_node = images_per_second(job, chosen) * job.record_bytes * AMPLIFICATION / job.machines.nodes
    where = f"images/s x {job.record_bytes:,.0f} bytes a record x {AMPLIFICATION} (simulated) / nodes"
    return [Figure("bandwidth of a node from storage", of_node, "bytes/s", "arithmetic", where)]


def _whole(job: Job, chosen: Choice, rate: Rate) -> list[Figure]:
    spent = seconds(job, chosen)
    basis: Basis = "calibrated" if _basis(chosen, rate) == "calibrated" else "arithmetic"
    config = job.config
    figures = [
        Figure("samples", job.samples, "", "arithmetic", f"samples={config.samples:,}, in whole batches"),
        Figure("steps", job.samples / config.optim.batch, "", "arithmetic", f"of {config.optim.batch:,} samples"),
    ]
    if job.records:
        figures.append(Figure("epochs", job.samples / job.records, "", "arithmetic", f"of {job.records:,} records"))
    less = ", less until the discriminator is trained" if job.lighter(job.cost(1)) < 1 else ""
    figures.append(Figure("hours of steps", spent / 3600, "hours", basis, f"samples / images/s{less}"))
    return figures


def _notes(job: Job, chosen: Choice) -> list[str]:
    notes = []
    storage, nodes = job.machines.storage_gb_s, job.machines.nodes
    if job.record_bytes and storage:
        of_node = images_per_second(job, chosen) * job.record_bytes * AMPLIFICATION / nodes
        verdict = "enough" if of_node <= storage * 1e9 else "TOO LITTLE: steps will wait for data"
        notes.append(f"cluster.storage_gb_s={storage:g} is {verdict}")
    if chosen.send_s > 0.1 * chosen.step_s:
        share = chosen.send_s / chosen.step_s
        notes.append(
            f"up to {share:.0%} of a step is spent on sending; what overlaps with the backward pass is not taken off"
        )
    if isinstance(job.config, TrainConfig) and chosen.recomputed:
        notes.append(f"{chosen.recomputed} blocks are computed again in the backward pass, which images/s includes")
    if job.records and job.samples < job.records:
        notes.append(f"the run sees {job.samples / job.records:.0%} of the records once, and the others never")
    return notes
