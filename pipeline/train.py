"""latentmill train: read the configuration, build the run's parts, and train to the last sample. A denoiser is built
here, a classifier in training/classifying.py.

Started again with the same configuration, it resumes from the newest commit, on any number of ranks and any ZeRO stage;
of a finished run it says that it is finished. On Ctrl-C, SIGTERM and SIGUSR1 it commits first and exits with 75.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainConfig
from pipeline.distributed.exits import leave
from pipeline.runs.directory import committed, dataset_urls
from pipeline.runs.stored import read_facts
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training import life
from pipeline.training.classifying import CLASSIFIER
from pipeline.training.inputs import DiffusionData, open_data
from pipeline.training.life import Kind, require_compiler

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.format.contract import Contract
    from pipeline.distributed.world import World
    from pipeline.models.denoiser import Denoiser
    from pipeline.runs.lease import Lease


def main(config: TrainConfig) -> int:
    """The verb. Returns the exit status; raises LatentmillError."""
    return life.main(config, kind_of(config))


def train(config: TrainConfig, world: World) -> None:
    """Train as one rank of a world that is there."""
    life.train(config, world, kind_of(config))


def train_on(data: DiffusionData, config: TrainConfig, world: World, lease: Lease | None) -> None:
    """Build a denoiser and everything else, and train. lease: the run's, on rank 0; None on other ranks."""
    from pipeline.models.denoiser import Denoiser
    from pipeline.models.encoders.latents import Latents
    from pipeline.planning.flops import image_flops
    from pipeline.training.engines.choose import make_engine
    from pipeline.training.evaluations import evaluation, validation_loss
    from pipeline.training.inputs import Inputs
    from pipeline.training.objectives.diffusion import DiffusionObjective

    run = open_storage(config.run)
    contract = data.manifest.contract
    denoiser = Denoiser(config.model, data.task)
    denoiser.reset_parameters(config.seed)
    life.begin(data, config, world, denoiser, lambda: initial_weights(config, run, denoiser, contract))
    if config.compile:
        require_compiler(world.device.type)
        denoiser.unet.compile_blocks()
    engine = make_engine(denoiser, config, world)
    with (
        life.tracked(config, world) as (tracker, folder),
        evaluation(config, run, world, data.manifest, data.empty, tracker) as evaluate,
    ):
        inputs = Inputs(Latents.of(contract), data.task, config.seed, text_encoder(config, contract, world))
        flops = image_flops(config.model, config.task.channels(contract))
        objective = DiffusionObjective(config.diffusion, config.task.drop, engine=engine, inputs=inputs, flops=flops)
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
            validation=validation_loss(config, objective, inputs),
            validate_every=config.eval.loss_every,
        )


def text_encoder(config: TrainConfig, contract: Contract, world: World) -> Callable[[Tensor], Tensor] | None:
    """A function from token ids (B, L) to the text states (B, L, D) that a cache with text_storage=full holds; None
    where the task reads no states, or the cache holds them."""
    from pipeline.inference.trained import encode_tokens, load_encoders

    if contract.text is None or contract.text.storage != "tokens" or "text" not in config.task.members:
        return None
    beside = (*dataset_urls(config.data), config.data.val)
    _, tower = load_encoders(contract, world.device, config.encoders, beside=beside)
    assert tower is not None, "a cache with captions has a tower"
    return partial(encode_tokens, tower)


def initial_weights(config: TrainConfig, run: Storage, denoiser: Denoiser, contract: Contract) -> dict[str, Any]:
    """The facts that run.json records about the run's initial weights; {} for random ones. At the beginning of a run
    the weights are also loaded into the denoiser. Rank 0 only."""
    from pipeline.training.start import begin

    if not config.init:
        return {}
    if committed(run):
        return dict(read_facts(run).get("init", {}))
    return begin(config, denoiser, contract)


DENOISER = Kind(open_data, train_on)


def kind_of(config: TrainConfig) -> Kind[TrainConfig, Any]:
    """What opens the data of the task's network, and trains it."""
    return DENOISER if config.task.draws else CLASSIFIER


if __name__ == "__main__":
    from pipeline import cli

    leave(cli.main(["train", *sys.argv[1:]]))
