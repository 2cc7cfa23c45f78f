"""The choice of a ZeRO stage and a micro-batch: the memory, the traffic and the time of each, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError
from pipeline.planning.plan.communication import sending_seconds, sent_bytes
from pipeline.planning.plan.job import Job
from pipeline.planning.plan.speeds import Speeds

ROOM = 0.9
"""Share of a GPU's memory that a step may take: kernels, NCCL and the driver need the rest (jobs/train.py)."""
MOST_MICRO = 256
"""Largest micro-batch that is looked at, besides the one that is configured."""
EQUAL = 1.01
"""Times whose ratio is smaller count as equal: the arithmetic is not that exact."""


@dataclass(frozen=True)
class Choice:
    """A ZeRO stage and a micro-batch. precision: of its passes. peak: most bytes of a rank at once in a step. state:
    bytes of weights, gradients, optimizer and averages. recomputed: blocks that the backward pass computes again. sent:
    bytes that a rank sends in a step. compute_s, send_s: seconds of a step in which a rank computes and sends; what a
    calibrated rate has of sending is in compute_s. fits: whether the peak fits a GPU with room to spare; None = its
    memory is not known.
    """

    stage: int
    micro_batch: int
    precision: str
    peak: int
    state: int
    recomputed: int
    sent: int
    compute_s: float
    send_s: float
    fits: bool | None

    @property
    def step_s(self) -> float:
        """Seconds of a step, if nothing is sent while a rank computes."""
        return self.compute_s + self.send_s

    @property
    def words(self) -> str:
        return f"ZeRO {self.stage}, micro-batches of {self.micro_batch}"


@dataclass(frozen=True)
class Scale:
    """The same run on another number of nodes. hours: of its steps alone. sent: share of a step in which ranks send.
    fits: whether a step fits a GPU with room to spare; None = its memory is not known."""

    nodes: int
    ranks: int
    images_per_s: float
    hours: float
    device_hours: float
    sent: float
    fits: bool | None = None


def scales(job: Job, chosen: Choice, speeds: Speeds) -> tuple[Scale, ...]:
    """The run with the same batch on a quarter to four times as many nodes, where the batch divides; () without GPUs.
    The ZeRO stage stays, and so does the micro-batch, unless a rank's share is smaller."""
    machines, batch = job.machines, job.config.optim.batch
    fewer = {max(1, machines.nodes // 4), max(1, machines.nodes // 2)}
    counts = sorted({*fewer, machines.nodes, 2 * machines.nodes, 4 * machines.nodes})
    found = []
    for nodes in counts if machines.gpu else ():
        other = replace(job, machines=replace(machines, nodes=nodes))
        world = other.machines.world
        micro = math.gcd(chosen.micro_batch, batch // world) if batch % world == 0 else 0
        if micro:
            one = choice(other.of(chosen.stage, micro), speeds)
            hours = job.samples / batch * one.step_s / 3600 * job.lighter(job.cost(1))
            sent = one.send_s / one.step_s
            found.append(Scale(nodes, world, batch / one.step_s, hours, hours * world, sent, one.fits))
    return tuple(found)


def micro_batches(job: Job) -> list[int]:
    """Sizes of micro-batches that divide a rank's share: powers of two, the share itself, and the configured one."""
    powers = [2**i for i in range(MOST_MICRO.bit_length())]
    whole = [job.share] if job.share <= MOST_MICRO else []
    return sorted({size for size in (*powers, *whole, job.micro) if size <= max(job.share, 1) and not job.share % size})


def choices(job: Job, speeds: Speeds) -> tuple[Choice, ...]:
    """Every stage with every micro-batch, but those of which model.activation_gb keeps the activations out."""
    found = []
    for micro in micro_batches(job):
        for stage in job.stages:
            if stage == 0 and job.config.precision == "bf16" and job.config.deepspeed.engine == "deepspeed":
                continue  # refused: it has no fp32 master weights
            try:
                found.append(choice(job.of(stage, micro), speeds))
            except ConfigError:
                if (stage, micro) == (job.stage, job.micro):
                    raise
    return tuple(found)


def choice(job: Job, speeds: Speeds) -> Choice:
    """The one that is configured. Raises ConfigError where activations cannot fit model.activation_gb."""
    needed, limit, world = job.needed(), job.machines.limit_gb, job.machines.world
    precision = job.passes()
    sent = sent_bytes(needed.parameters, precision, job.stage, world, job.share // job.micro)
    rate = speeds.training(job)
    # Within a machine a calibration of as many ranks has the traffic of its own steps, in ZeRO 2, in its rate.
    within = world > 1 and job.machines.nodes == 1 and rate.reduced == world
    counted = sent_bytes(needed.parameters, precision, 2, world) if within else 0
    return Choice(
        stage=job.stage,
        micro_batch=job.micro,
        precision=precision,
        peak=needed.peak,
        state=needed.state,
        recomputed=needed.recomputed,
        sent=sent,
        compute_s=job.share / rate.per_s,
        send_s=sending_seconds(max(0, sent - counted), job.machines),
        fits=needed.peak <= ROOM * limit * 1e9 if limit else None,
    )


def recommended(found: Sequence[Choice], configured: Choice | None = None) -> Choice | None:
    """The fastest of those that fit; of those within 1 % of it the configured one, else the lowest stage, then the
    largest micro-batch. Stage 3, whose gathers around every layer nobody has timed here, only where no other fits. None
    where none fits, or it is not known."""
    fitting = [one for one in found if one.fits and one.stage < 3] or [one for one in found if one.fits]
    if not fitting:
        return None
    bound = EQUAL * min(one.step_s for one in fitting)
    fitting = [one for one in fitting if one.step_s <= bound]
    if configured in fitting:
        return configured
    return min(fitting, key=lambda one: (one.stage, -one.micro_batch))


def reason(best: Choice, chosen: Choice, found: Sequence[Choice], job: Job) -> str:
    """Why a choice is the recommended one, in one sentence. chosen: the configured one."""
    fitting = [one for one in found if one.fits]
    limit = f"{ROOM:.0%} of the {job.machines.limit_gb:g} GB of one {job.machines.device}"
    why = f"{best.words}: the fastest of the {len(fitting)} of {len(found)} that fit {limit}"
    if best == chosen:
        return f"{why}, and the one that is configured"
    ties = " (of equals, the lowest stage and the largest micro-batch; ZeRO 3 only where no other fits)"
    if chosen.fits is False:
        return f"{why}; the configured one ({chosen.words}) needs {chosen.peak / 1e9:.3g} GB and does not fit{ties}"
    return f"{why}; the configured one ({chosen.words}) takes {chosen.step_s / best.step_s:.2f} times as long{ties}"
