"""How fast a job's machines train, sample and encode: the rates of planning/rates, asked about a job's networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import EncodeConfig
from pipeline.data.format.contract import Contract
from pipeline.planning.memory import Precision
from pipeline.planning.parts import Cost
from pipeline.planning.plan.figures import Rate
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.networks import Encoders
from pipeline.planning.rates.rates import CPU, Rates

JUDGED = "perceptual."
"""Beginning of the names of parts of a step that compute in float32."""


@dataclass(frozen=True)
class Speeds:
    """The rates that are known. efficiency: share of a device's peak in training, in place of any measurement; 0 = not
    given."""

    rates: Rates
    efficiency: float = 0.0

    def training(self, job: Job) -> Rate:
        """Images that a rank trains on in a second, while nothing is sent between nodes. Raises ConfigError for a GPU
        that nothing is known of."""
        cost = job.cost(job.micro)
        recomputed = job.recomputed(job.micro, cost)
        rate = self.rates.training(
            cost,
            job.micro,
            precision=job.passes(),
            compile=job.compiled,
            gpu=job.machines.gpu or CPU,
            world=job.machines.ranks,
            ranks=job.machines.world,
            micro_batches=job.share // job.micro,
            optimizer=job.config.optim.name,
            recomputed=recomputed,
            efficiency=self.efficiency,
        )
        if rate.basis == "calibrated":
            return rate
        if job.passes() == "bf16" and (judges := tuple(part for part in cost.parts if part.name.startswith(JUDGED))):
            rate = self._with_float32(rate, Cost(judges), cost, job)
        if not recomputed:
            return rate
        slower = sum(cost.training_flops(recomputed).values()) / sum(cost.training_flops().values())
        where = f"{rate.where}; {slower - 1:.0%} more FLOPs, since {len(recomputed)} blocks are computed again"
        return Rate(rate.per_s / slower, rate.unit, "arithmetic", where)

    def _with_float32(self, rate: Rate, judges: Cost, cost: Cost, job: Job) -> Rate:
        """A rate in bf16 of a step of which some parts compute in float32 whatever the precision is. judges: those."""
        alone = self.rates.training(
            judges,
            job.micro,
            precision="fp32",
            gpu=job.machines.gpu or CPU,
            world=job.machines.ranks,
            efficiency=self.efficiency,
        )
        share = sum(judges.training_flops().values()) / sum(cost.training_flops().values())
        seconds = (1 - share) / rate.per_s + 1 / alone.per_s
        where = f"{rate.where}; the perceptual distance ({share:.0%} of the FLOPs) in float32: {alone.where}"
        return Rate(1 / seconds, rate.unit, rate.basis, where)

    def predicting(
        self,
        network: Cost,
        images: int,
        machines: Machines,
        *,
        passes: float = 1.0,
        decoder: Cost | None = None,
        beside: tuple[Cost, ...] = (),
        precision: Precision = "fp32",
    ) -> Rate:
        """Images that a rank predicts in a second. network: of a prediction for so many images, of which each image
        takes `passes`, in this precision. decoder, beside: of what comes after for as many, in float32."""
        where: dict[str, Any] = {"gpu": machines.gpu or CPU, "world": machines.ranks}
        after: dict[str, Any] = {"decoder": decoder, "beside": beside}
        if precision == "fp32":
            return self.rates.sampling(network, images, passes, precision=precision, **after, **where)
        rate = self.rates.sampling(network, images, passes, precision=precision, **where)
        if decoder is None and not beside:
            return rate
        rest = self.rates.sampling(Cost(()), images, 1.0, precision="fp32", **after, **where)
        texts = f"{rate.where}; what comes after: {rest.where}"
        return Rate(1 / (1 / rate.per_s + 1 / rest.per_s), rate.unit, rate.basis, texts)

    def encoding(
        self,
        config: EncodeConfig,
        contracts: tuple[Contract, ...],
        encoders: Encoders,
        machines: Machines,
        source_pixels: float,
    ) -> Rate:
        """Images of the source that a process encodes in a second, for all resolutions, and flipped as well where
        encode.flip says so. source_pixels: of a picture."""
        stages = [encoders.encoder(contract, config.batch * (2 if config.flip else 1)) for contract in contracts]
        parts = tuple(part for stage in stages if stage is not None for part in stage.parts)
        text = encoders.tower(config.batch * config.captions) if config.text_kind in ("full", "trimmed") else None
        return self.rates.encoding(
            Cost(parts) if parts else None,
            config.batch,
            text=text,
            source_pixels=source_pixels,
            precision="fp32" if config.encoders.vae_dtype == "float32" else "bf16",
            gpu=machines.gpu or CPU,
            processes=machines.ranks,
            cores=machines.threads,
        )
