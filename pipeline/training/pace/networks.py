"""Measures training steps: forward, backward, gradient's norm, optimizer, average, and the agreements of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from pipeline.config import (
    AutoencoderConfig,
    DataConfig,
    DeepSpeedConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.data.reading.batch import Batch
from pipeline.diffusion.objective import Objective as Diffusion
from pipeline.diffusion.objective import training_randomness
from pipeline.distributed.world import World
from pipeline.models.unet.model import UNet
from pipeline.planning.first_stage import step_cost
from pipeline.planning.parts import Cost
from pipeline.planning.perceptual import backbone_of
from pipeline.planning.rates.calibration import Network, Optimizer
from pipeline.training.ema import Ema
from pipeline.training.engines.base import Engine
from pipeline.training.engines.choose import make_engine
from pipeline.training.objectives.pixels import PIXELS
from pipeline.training.pace.references import Reference
from pipeline.training.pace.timing import median_s

LEARNING_RATE = 1e-3
"""Large enough that the layers which begin at zero leave it at once, and low enough for random data."""
STEPS = 5
"""Fewest steps of a measurement."""


@contextmanager
def stepping(
    module: nn.Module, config: RunConfig, world: World, losses: Callable[[Engine], torch.Tensor]
) -> Iterator[Callable[[], None]]:
    """What takes one training step of the module. losses: the mean loss of a micro-batch of this rank's."""
    engine = make_engine(module, config, world)
    ema = Ema(config.ema, [fragment.view for fragment in engine.averaged()])
    seen = 0

    def step() -> None:
        nonlocal seen
        world.sum([0.0, 0.0, 0.0])  # the ranks' agreement before each step of training
        for _ in range(engine.micro_batches):
            engine.backward(losses(engine))
        norms = engine.grad_norms()
        engine.step(LEARNING_RATE, norms)
        seen += config.optim.batch
        ema.update(seen, config.optim.batch)

    try:
        yield step
    finally:
        engine.destroy()


def of_reference(reference: Reference, base: RunConfig, world: World, seconds: float) -> tuple[float, Cost]:
    """Seconds of a step of a reference network, and its cost. base: engine, precision and device. Collective."""
    optim = replace(base.optim, name=reference.optimizer, batch=reference.images * world.size, micro_batch=0)
    config = train_config(base, reference.model, optim)
    step_s = of_unet(reference.model, config, world, reference.side, reference.tokens, reference.images, seconds)
    return step_s, reference.cost()


def of_unet(
    model: ModelConfig, config: TrainConfig, world: World, side: int, tokens: int, images: int, seconds: float
) -> float:
    """Seconds of a step of a UNet on random latents of side x side and contexts of so many tokens. images: of a
    micro-batch. Collective."""
    device = world.device
    unet = UNet(model).to(device)
    unet.reset_parameters(0)
    if config.compile:
        unet.compile_blocks()
    shape = (model.out_channels, side, side)
    latents = torch.randn(images, *shape, device=device)
    extra = torch.randn(images, model.in_channels - model.out_channels, side, side, device=device)
    context = torch.randn(images, tokens, model.context_width, device=device) if model.context_width else None
    vector = torch.randn(images, model.vector_width, device=device) if model.vector_width else None
    numbers = torch.arange(images, device=device) + images * world.rank
    diffusion = Diffusion(config.diffusion, device)

    def losses(engine: Engine) -> torch.Tensor:
        draws = training_randomness(0, numbers, shape, config.diffusion, 0.1)

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = torch.cat([x, extra.to(x)], dim=1) if extra.shape[1] else x
            return engine(x, t, context, None, vector)

        return diffusion.loss(denoise, latents, draws.noise, draws.timestep).mean()

    with stepping(unet, config, world, losses) as step:
        return median_s(step, world, seconds, STEPS)


def of_autoencoder(
    config: AutoencoderConfig, world: World, side: int, images: int, seconds: float
) -> tuple[float, Cost]:
    """Seconds of a step of an autoencoder with its losses, the discriminator's included, on random pictures of
    side x side, and its cost. Collective."""
    from pipeline.models.first_stage.trainable import TrainableAutoencoder
    from pipeline.models.perceptual.loaded import load_perceptual
    from pipeline.training.objectives.first_stage import FirstStageObjective

    perceptual = world.together(lambda: load_perceptual(config.loss.perceptual, world.device, "loss.perceptual"))
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.reset_parameters(0)
    numbers = torch.arange(images) + images * world.rank
    n = config.gan.after + config.gan.ramp + config.optim.batch  # everything that is ever trained is trained
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    batch = Batch(n, numbers, {PIXELS: pixels}, numbers, numbers, list)
    objectives: list[FirstStageObjective] = []

    def losses(engine: Engine) -> torch.Tensor:
        if not objectives:
            objectives.append(FirstStageObjective(config, engine=engine, perceptual=perceptual))
        prepared = objectives[0].prepare(batch)
        return objectives[0].losses(prepared, slice(0, images)).total

    with stepping(module, config, world, losses) as step:
        step_s = median_s(step, world, seconds, STEPS)
    backbone = backbone_of(config.loss.perceptual)
    return step_s, step_cost(config.autoencoder, config.gan, images, side, side, perceptual=backbone)


def base_config(device: str, precision: str) -> TrainConfig:
    """The engine, precision and device of the references: ZeRO 2 by DeepSpeed, AdamW."""
    return TrainConfig(
        run="none",
        data=DataConfig(train="none"),
        optim=OptimConfig(lr=LEARNING_RATE),
        deepspeed=DeepSpeedConfig(stage=2),
        device=device,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
    )


def train_config(base: RunConfig, model: ModelConfig, optim: OptimConfig) -> TrainConfig:
    """A configuration of a UNet with the engine, precision and device of `base`."""
    compiled = isinstance(base, TrainConfig) and base.compile
    return TrainConfig(
        run="none",
        data=DataConfig(train="none"),
        model=model,
        optim=optim,
        diffusion=base.diffusion if isinstance(base, TrainConfig) else DiffusionConfig(),
        deepspeed=base.deepspeed,
        device=base.device,
        precision=base.precision,
        compile=compiled,
    )


def network(name: str, cost: Cost, images: int, optimizer: Optimizer, step_s: float, fitted_s: float) -> Network:
    """The record of a measured network. cost: of a step of one rank with so many images."""
    return Network(
        name=name,
        parameters=cost.parameters,
        flops=sum(cost.training_flops().values()) / images,
        images=images,
        optimizer=optimizer,
        step_s=step_s,
        fitted_s=fitted_s,
    )
