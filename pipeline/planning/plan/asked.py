"""From a run's configuration and its cache to what is planned: the job, and the encoders of the cache."""

from __future__ import annotations

from pipeline.config import AutoencoderConfig, EncodersConfig, RunConfig, TrainConfig
from pipeline.config.loading.merge import from_dict
from pipeline.data.format.contract import Contract
from pipeline.planning.plan.encoding import Cached
from pipeline.planning.plan.job import Job, Machines
from pipeline.planning.plan.networks import Encoders


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
