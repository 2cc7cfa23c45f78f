"""Measures predictions: UNets as `sample` runs them, autoencoders' halves, and the decoding of pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.config import EncodersConfig, FirstStageConfig
from pipeline.distributed.world import World
from pipeline.inference.packed import pack
from pipeline.inference.precision import products
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import KLStage, NetworkStage
from pipeline.models.first_stage import architecture
from pipeline.models.unet.model import UNet
from pipeline.planning.first_stage import autoencoder_cost
from pipeline.planning.parts import Cost
from pipeline.planning.plan.networks import IN_DECODER, first_stage_of
from pipeline.training.pace.references import Reference
from pipeline.training.pace.timing import median_s

SOURCE = (512, 384)
"""Width and height of the JPEG that is decoded."""
CROP = 256
"""Side of the crop that is made of it."""
MIDDLE = FirstStageConfig(channels=48, multipliers=(1, 2, 4, 4), blocks=2, norm_groups=16)
"""An autoencoder in Stable Diffusion's proportions, measured beside the demo's."""
IMAGES = {"cpu": (32, 1), "cuda": (256, 32)}
"""Images at a time of the demo's autoencoder and of the other."""


@dataclass(frozen=True)
class Passed:
    """A measured pass: its cost, and its seconds."""

    cost: Cost
    seconds: float


def of_unet(reference: Reference, world: World, seconds: float) -> Passed:
    """A prediction of a reference network in float32, with packed weights where `sample` has them. Collective."""
    model, device = reference.model, world.device
    unet = UNet(model).to(device).requires_grad_(False).eval()
    unet.reset_parameters(0)
    pack(unet)
    x = torch.randn(reference.images, model.in_channels, reference.side, reference.side, device=device)
    context = None
    if model.context_width:
        context = torch.randn(reference.images, reference.tokens, model.context_width, device=device)
    timestep = torch.full((reference.images,), 500, device=device)

    def predict() -> None:
        with torch.no_grad(), products(tf32=False):
            unet(x, timestep, context)

    return Passed(reference.cost(), median_s(predict, world, seconds))


def of_first_stages(world: World, seconds: float) -> list[Passed]:
    """Encoding and decoding by the demo's autoencoder and by one in Stable Diffusion's proportions, in float32.
    Collective."""
    demo = load_autoencoder(EncodersConfig(), world.device)
    middle = random_stage(MIDDLE, world.device)
    assert isinstance(demo, NetworkStage)
    batch = IMAGES[world.device.type]
    passed: list[Passed] = []
    for stage, images, side in ((demo, batch[0], 64), (middle, batch[1], 128)):
        whole = autoencoder_cost(first_stage_of(dict(stage.model.config)), images, side, side)
        x = torch.rand(images, 3, side, side) * 2 - 1
        z = torch.randn(images, stage.latent_channels, side // stage.downsampling, side // stage.downsampling)

        def encode(stage: NetworkStage = stage, x: torch.Tensor = x) -> None:
            with products(tf32=False):
                stage.encode(x)

        def decode(stage: NetworkStage = stage, z: torch.Tensor = z) -> None:
            with products(tf32=False):
                stage.decode(z)

        passed.append(Passed(half(whole, decoder=False), median_s(encode, world, seconds / 4)))
        passed.append(Passed(half(whole, decoder=True), median_s(decode, world, seconds / 4)))
    return passed


def random_stage(config: FirstStageConfig, device: torch.device) -> KLStage:
    """An autoencoder of an architecture with random weights, as a stage that only predicts."""
    from pipeline.models.encoders import packages

    described = architecture.diffusers_config(config)
    network = getattr(packages, described.pop("_class_name"))(**described)
    architecture.reset_parameters(network, 0)
    return KLStage(network, torch.float32, device)


def half(whole: Cost, *, decoder: bool) -> Cost:
    """An autoencoder's encoder, or its decoder."""
    parts = tuple(part for part in whole.parts if part.name.startswith(IN_DECODER) == decoder)
    return Cost(parts, whole.inputs)


def decoded_pixels_s(world: World, seconds: float) -> float:
    """Pixels of a JPEG that one core decodes, resizes and crops in a second, while every rank does. Collective."""
    width, height = SOURCE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [127 + 60 * np.sin(x / 17 + k) + 60 * np.cos(y / 23 + x / (40 + 9 * k)) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    picture = (np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)

    def decode() -> None:
        image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
        scale = CROP / min(image.size)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left = (resized.width - CROP) // 2
        np.asarray(resized.crop((left, 0, left + CROP, CROP)))

    return width * height / median_s(decode, world, seconds)
