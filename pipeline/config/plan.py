"""latentmill plan: what encoding, training and evaluations will cost, before they are paid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.cluster import ClusterConfig
from pipeline.config.values.bounds import Between, Ge


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """latentmill plan: say what a run will take before anything is run: images and bytes of the cache, parameters,
    memory by ZeRO stage and micro-batch, images/s, communication, bandwidth, what a bucket will hold, hours and price,
    and of each figure whether it was measured. Reads no weights and needs no GPU. Beside the keys here it takes every
    key of the verb that trains (`latentmill train --help`, `latentmill autoencoder --help`), and those of `latentmill
    encode` after `encode.`, as encode.resolution=512. `run` and `data.train` may be left out."""

    images: str = ""
    """Number of images of the source, such as 100000000, 100M or 1.5B; "" = those of `source` or of data.train."""
    source: str = ""
    """Input shards, as source of `latentmill encode`: they are listed, and of some the members are read; "" = none."""
    trial: Annotated[int, Ge(0)] = 1
    """Shards of `source` whose members are read, to count images and to measure captions; 0 = none: give images."""
    verb: Literal["", "train", "autoencoder"] = ""
    """The verb that trains; "" = the one that knows the experiment and the keys that are given."""
    gpu: str = ""
    """Kind of GPU, such as a100, h100 or h200; "" = cluster.gpu_type, and without a cluster this machine's CPUs."""
    efficiency: Annotated[float, Between(0, 1)] = 0.0
    """Share of a GPU's peak rate that training reaches, in place of all that is known of it; 0 = what was calibrated
    or measured, else the share that is assumed."""
    rates: str = ""
    """File that `latentmill calibrate` wrote; "" = that of LATENTMILL_RATES, else ~/.config/latentmill/rates.json where
    it is there."""
    downsampling: Annotated[int, Ge(0)] = 0
    """Pixels per latent position, along a side, of an autoencoder that is not known; 0 = that of the encoders, or of
    the experiment."""
    price: Annotated[float, Ge(0, "a price of 0 (not shown) or more is wanted")] = 0.0
    """Price of one GPU for an hour (without GPUs: of one process), in any currency; 0 = no price is shown."""
    json: str = ""
    """File for the plan's figures, a path or URL in a bucket; as plan.json of a run's directory the run's report shows
    them beside what happened; "" = none."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster, as `latentmill submit` takes it: cluster=NAME, cluster.KEY=VALUE, and nodes=N."""
