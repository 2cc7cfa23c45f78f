"""The training of a classifier of noisy latents, on the caches, noise, times and order of a diffusion model's run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import ClassifierTask, TrainConfig
from pipeline.storage.urls import open_storage
from pipeline.training import life
from pipeline.training.inputs import Data, open_labelled
from pipeline.training.life import Kind, require_compiler

if TYPE_CHECKING:
    from pipeline.distributed.world import World
    from pipeline.runs.lease import Lease


def train_on(data: Data, config: TrainConfig, world: World, lease: Lease | None) -> None:
    """Build a classifier and everything else, and train. lease: the run's, on rank 0; None on other ranks."""
    from pipeline.models.classifier import Classifier
    from pipeline.models.encoders.latents import Latents
    from pipeline.planning.flops import classifier_flops
    from pipeline.training.engines.choose import make_engine
    from pipeline.training.evaluations import classifier_evaluation, validation_loss
    from pipeline.training.inputs import Inputs
    from pipeline.training.objectives.classifier import ClassifierObjective

    run, task, contract = open_storage(config.run), config.task, data.manifest.contract
    assert isinstance(task, ClassifierTask), task
    classes = task.classes(contract)
    classifier = Classifier(config.model, classes, task.pool)
    classifier.reset_parameters(config.seed)
    life.begin(data, config, world, classifier, dict)
    if config.compile:
        require_compiler(world.device.type)
        classifier.compile_blocks()

    engine = make_engine(classifier, config, world)
    with (
        life.tracked(config, world) as (tracker, folder),
        classifier_evaluation(config, run, world, tracker) as evaluate,
    ):
        inputs = Inputs(Latents.of(contract), None, config.seed)
        flops = classifier_flops(config.model, classes, task.pool)
        objective = ClassifierObjective(config.diffusion, 0.0, engine=engine, inputs=inputs, flops=flops)
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


CLASSIFIER = Kind(open_labelled, train_on)
