"""The training of a classifier of noisy latents, on the caches, noise, times and order of a diffusion model's run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import ClassifierTask, TrainConfig
from pipeline.storage.urls import open_storage
from pipeline.training.inputs import Data, open_labelled
from pipeline.training.life import Kind, describe_run, require_compiler

if TYPE_CHECKING:
    from pipeline.distributed.world import World
    from pipeline.runs.lease import Lease
    from pipeline.training.engines.base import Engine
    from pipeline.training.evaluations import Validate
    from pipeline.training.objectives.base import Objective


def train_on(data: Data, config: TrainConfig, world: World, lease: Lease | None) -> None:
    """Build a classifier and everything else, and train. lease: the run's, on rank 0; None on other ranks."""
    from pipeline.models.classifier import Classifier
    from pipeline.models.encoders.latents import Latents
    from pipeline.planning.flops import classifier_flops
    from pipeline.training.assembly import train_network
    from pipeline.training.evaluations import classifier_evaluation, validation_loss
    from pipeline.training.inputs import Inputs
    from pipeline.training.objectives.classifier import ClassifierObjective

    run, task, contract = open_storage(config.run), config.task, data.manifest.contract
    assert isinstance(task, ClassifierTask), task
    classes = task.classes(contract)
    classifier = Classifier(config.model, classes, task.pool)
    classifier.reset_parameters(config.seed)
    world.together(lambda: describe_run(config, run, data.manifest, data.manifests, data.mixture), rank=0)
    if config.compile:
        require_compiler(world.device.type)
        classifier.compile_blocks()

    def objective_of(engine: Engine) -> tuple[Objective, Validate | None]:
        inputs = Inputs(Latents.of(contract), None, config.seed)
        flops = classifier_flops(config.model, classes, task.pool)
        objective = ClassifierObjective(config.diffusion, 0.0, engine=engine, inputs=inputs, flops=flops)
        return objective, validation_loss(config, objective, inputs)

    train_network(
        *(config, data, world, lease),
        module=classifier,
        evaluation=lambda tracker: classifier_evaluation(config, run, world, tracker),
        objective_of=objective_of,
        validate_every=config.eval.loss_every,
    )


CLASSIFIER = Kind(open_labelled, train_on)
