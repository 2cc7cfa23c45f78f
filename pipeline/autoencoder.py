"""latentmill autoencoder: train a first stage on a cache of pixels.

It resumes, stops and is distributed as latentmill train is (training/life.py); ZeRO stage 3 is refused.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import AutoencoderConfig
from pipeline.config.loading.merge import to_stored
from pipeline.distributed.exits import leave
from pipeline.storage.urls import open_storage
from pipeline.training import life
from pipeline.training.inputs import Data
from pipeline.training.life import Kind, describe_run
from pipeline.training.objectives.pixels import check_caches, open_pixels

if TYPE_CHECKING:
    from pipeline.distributed.world import World
    from pipeline.runs.lease import Lease


def main(config: AutoencoderConfig) -> int:
    """The verb. Returns the exit status; raises LatentmillError."""
    return life.main(config, KIND)


def train(config: AutoencoderConfig, world: World) -> None:
    """Train as one rank of a world that is there."""
    life.train(config, world, KIND)


def train_on(data: Data, config: AutoencoderConfig, world: World, lease: Lease | None) -> None:
    """Build everything else and train. lease: the run's, on rank 0; None on other ranks."""
    from pipeline.models.first_stage.trainable import TrainableAutoencoder
    from pipeline.models.perceptual.loaded import load_perceptual
    from pipeline.tracking.tracker import Tracker
    from pipeline.training.assembly import make_trainer
    from pipeline.training.engines.choose import make_engine
    from pipeline.training.objectives.first_stage import FirstStageObjective
    from pipeline.training.objectives.initial import initial_weights
    from pipeline.training.start import share

    run = open_storage(config.run)
    perceptual = world.together(lambda: load_perceptual(config.loss.perceptual, world.device, "loss.perceptual"))
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.reset_parameters(config.seed)

    def begin() -> None:
        init_facts = initial_weights(config, run, module)
        describe_run(config, run, data.manifest, data.manifests, data.mixture, init_facts)

    world.together(begin, rank=0)
    if config.init:
        share(module, world)
    engine = make_engine(module, config, world)
    settings = to_stored(config)
    with (
        tempfile.TemporaryDirectory(prefix="latentmill-") as folder,
        Tracker(run, config.tracking, settings=settings, folder=Path(folder), enabled=world.rank == 0) as tracker,
    ):
        trainer = make_trainer(
            config,
            world=world,
            engine=engine,
            stream_from=lambda n: data.stream_from(start_n=n),
            objective=FirstStageObjective(config, engine=engine, perceptual=perceptual),
            run=run,
            folder=Path(folder),
            tracker=tracker,
            manifests=data.manifests,
            mixture=data.mixture,
            fence=lease.require_held if lease else None,
        )
        if lease:
            lease.progress = lambda: trainer.n
        try:
            trainer.run()
        finally:
            engine.destroy()


KIND = Kind(open_pixels, train_on, check_caches)


if __name__ == "__main__":
    from pipeline import cli

    leave(cli.main(["autoencoder", *sys.argv[1:]]))
