"""latentmill autoencoder: train a first stage on a cache of pixels.

It resumes, stops and is distributed as latentmill train is (training/life.py); ZeRO stage 3 is refused. Programs may
add losses of their own (Further), as scripts/train_demo_encoders.py does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config import AutoencoderConfig
from pipeline.distributed.exits import leave
from pipeline.storage.urls import open_storage
from pipeline.training import life
from pipeline.training.inputs import Data
from pipeline.training.life import Kind
from pipeline.training.objectives.pixels import check_caches, open_pixels

if TYPE_CHECKING:
    from torch import nn

    from pipeline.distributed.world import World
    from pipeline.runs.lease import Lease


@dataclass(frozen=True)
class Further:
    """Losses beside those of the configuration, for a program that trains in this process.

    losses: makes a module whose forward pass gets Outputs, the pictures (b, 3, H, W) and `members`, each (b, ...), and
    returns weighted losses (scalars) by name. It is trained beside the autoencoder, and neither averaged nor exported.
    members: arrays of the cache beside its pixels; crop and flip do not change them. noise: standard deviation of
    latent noise, beyond the posterior's, that the decoder learns to tolerate.
    """

    losses: Callable[[], nn.Module]
    members: tuple[str, ...] = ()
    noise: float = 0.0


def main(config: AutoencoderConfig, further: Further | None = None) -> int:
    """The verb. Returns the exit status; raises LatentmillError."""
    if further is None:
        return life.main(config, KIND)
    assert config.launch.processes == 1, "other processes would not know of further losses"
    assert not (config.crop or config.flip), "the members would not be cut and flipped"
    kind = Kind(partial(open_pixels, members=further.members), partial(train_on, further=further), check_caches)
    return life.main(config, kind)


def train(config: AutoencoderConfig, world: World) -> None:
    """Train as one rank of a world that is there."""
    life.train(config, world, KIND)


def train_on(
    data: Data, config: AutoencoderConfig, world: World, lease: Lease | None, further: Further | None = None
) -> None:
    """Build everything else and train. lease: the run's, on rank 0; None on other ranks."""
    from pipeline.models.first_stage.trainable import TrainableAutoencoder
    from pipeline.models.perceptual.loaded import load_perceptual
    from pipeline.training.engines.choose import make_engine
    from pipeline.training.evaluations import first_stage_evaluation
    from pipeline.training.objectives.first_stage import FirstStageObjective
    from pipeline.training.objectives.initial import initial_weights

    run = open_storage(config.run)
    perceptual = world.together(lambda: load_perceptual(config.loss.perceptual, world.device, "loss.perceptual"))
    extra, noise = (further.losses(), further.noise) if further else (None, 0.0)
    module = TrainableAutoencoder(config.autoencoder, config.gan, extra, noise)
    module.reset_parameters(config.seed)
    life.begin(data, config, world, module, lambda: initial_weights(config, run, module))
    engine = make_engine(module, config, world)
    with (
        life.tracked(config, world) as (tracker, folder),
        first_stage_evaluation(config, run, world, tracker) as evaluate,
    ):
        objective = FirstStageObjective(config, engine=engine, perceptual=perceptual)
        life.to_the_end(
            data,
            config,
            world,
            lease,
            engine=engine,
            objective=objective,
            tracker=tracker,
            folder=folder,
            evaluate=evaluate,
        )


KIND = Kind(open_pixels, train_on, check_caches)


if __name__ == "__main__":
    from pipeline import cli

    leave(cli.main(["autoencoder", *sys.argv[1:]]))
