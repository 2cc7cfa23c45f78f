"""latentmill sample: images from a checkpoint, as one picture with a row per caption."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.config import SampleConfig
from pipeline.data.format.contract import Contract
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.world import pick_device
from pipeline.errors import ConfigError, DestinationExists
from pipeline.inference.picture_file import MOST_PIXELS, encoded, format_of, is_ours, require_room
from pipeline.inference.pictures import conditionings, draw
from pipeline.inference.trained import encode_captions, load_trained
from pipeline.log import log, show
from pipeline.models.encoders.text import TextTower
from pipeline.report.grid import MARGIN, PAPER, captioned, captioned_size
from pipeline.storage.base import Storage
from pipeline.storage.staging import require_place, require_writable
from pipeline.storage.urls import open_storage, split_url
from pipeline.tracking.progress import Progress

CAPTIONS = 64
"""Captions that the text tower reads at once."""


def main(config: SampleConfig) -> int:
    """Run the verb."""
    prompts = list(config.prompt) or [""]
    storage, key = look(config)
    rows = sample_rows(config, prompts)
    storage.put(key, encoded(captioned(rows, prompts), format_of(config.dest)))
    show(f"sample: {config.dest}: {config.n} images for each of {len(prompts)} captions")
    return 0


def look(config: SampleConfig) -> tuple[Storage, str]:
    """The destination's store and key. Raises ConfigError for a name that is no picture's, DestinationExists where
    something lies there that `sample` did not write."""
    format_of(config.dest)
    root, key = split_url(config.dest)
    storage = open_storage(root)
    require_place(storage, key)
    if storage.exists(key):
        small = storage.stat(key).size <= 4 * MOST_PIXELS
        if not small or not is_ours(storage.get(key), MARGIN // 2, PAPER):
            raise DestinationExists(
                f"{config.dest} exists and `latentmill sample` did not write it: choose another dest"
            )
    require_writable(storage)
    return storage, key


def sample_rows(config: SampleConfig, prompts: list[str]) -> list[np.ndarray]:
    """config.n images for each prompt: (n, H, W, 3) uint8 each, in the prompt's own size.

    Image k of prompt r starts from the noise of (seed, r n + k) for any division into batches. Other batches change a
    pixel by one level of 255 at most, by rounding. An unconditional model takes only the prompt "".
    """
    if config.n < 1:
        raise ConfigError(f"n={config.n}: at least one image per caption")
    kind = format_of(config.dest)
    sides = [(width, height) for width, height in map(_sides, config.size)] or [(1, 1)]
    require_room(kind, *captioned_size(config.n, sides if len(sides) == len(prompts) else sides * len(prompts)))
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_memory()
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    run, contract = trained.info.config, trained.contract
    if not run.task.takes_text and (any(prompts) or config.negative):
        raise ConfigError(f"{config.run} is unconditional and takes no prompt")
    shapes = latent_shapes(config.size, len(prompts), contract, 2 ** (len(run.model.multipliers) - 1))
    factor = contract.downsampling
    require_room(kind, *captioned_size(config.n, [(width * factor, height * factor) for _, height, width in shapes]))
    first_stage, tower = trained.encoders(device, config.encoders)
    warn_of_long([*prompts, config.negative], tower)
    captions = [*prompts, config.negative, ""]
    states_BLD = torch.cat(
        [
            encode_captions(tower, captions[start : start + CAPTIONS], trimmed=contract.trimmed).to(device)
            for start in range(0, len(captions), CAPTIONS)
        ]
    )
    denoiser = trained.denoiser(states_BLD[-1], device, packed=True)
    task = denoiser.task
    sampler = config.sampler if config.guidance is None else replace(config.sampler, guidance=config.guidance)
    pictures: dict[int, np.ndarray] = {}
    total = len(prompts) * config.n
    with Progress(total, "sample", "images") as progress:
        for shape in dict.fromkeys(shapes):
            numbers_of_shape = [number for number in range(total) if shapes[number // config.n] == shape]
            for start in range(0, len(numbers_of_shape), sampler.batch):
                numbers = numbers_of_shape[start : start + sampler.batch]
                negative = states_BLD[[len(prompts)] * len(numbers)]
                batch = {"text": states_BLD[[number // config.n for number in numbers]]}
                conditioning, null = conditionings(denoiser, batch, sampler)
                images, not_finite = draw(
                    denoiser,
                    first_stage,
                    run.diffusion,
                    sampler,
                    conditioning,
                    numbers,
                    config.seed,
                    shape,
                    device,
                    task({"text": negative}) if config.negative else null,
                )
                pictures |= zip(numbers, images, strict=True)
                progress.update(len(numbers))
                if not_finite:
                    log.warning(f"{not_finite} of {len(numbers)} images are not finite")
    return [np.stack([pictures[r * config.n + k] for k in range(config.n)]) for r in range(len(prompts))]


def latent_shapes(sizes: Sequence[str], count: int, contract: Contract, stride: int) -> list[tuple[int, int, int]]:
    """The latent (C, h, w) of each of `count` prompts, from sizes such as "512x768" (width x height, in pixels).

    stride: factor by which the UNet divides the sides of latents. Raises ConfigError for sizes that it cannot take.
    """
    channels, height, width = contract.latent_shape
    if not sizes:
        return [(channels, height, width)] * count
    multiple = contract.downsampling * stride
    shapes = []
    for size in sizes:
        sides = _sides(size)
        if any(side % multiple for side in sides):
            nearest = "x".join(str(max(round(side / multiple), 1) * multiple) for side in sides)
            raise ConfigError(f"size={size}: this model makes multiples of {multiple} pixels; the nearest is {nearest}")
        shapes.append((channels, sides[1] // contract.downsampling, sides[0] // contract.downsampling))
    return shapes if len(shapes) == count else shapes * count


def _sides(size: str) -> tuple[int, int]:
    """Width and height of a size such as "512x768"."""
    width, height = size.split("x")
    return int(width), int(height)


def warn_of_long(prompts: list[str], tower: TextTower) -> None:
    """Warn of captions that are longer than the context, whose end is not read, as in training and in diffusers."""
    for prompt in prompts:
        tokens = tower.ids(prompt)[1]
        if tokens > tower.length:
            excerpt = f"{prompt[:40]}..." if len(prompt) > 43 else prompt
            log.warning(
                f"the caption {excerpt!r} has {tokens} tokens with start and end, and the model reads "
                f"{tower.length}: its last {tokens - tower.length} are left out",
            )


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["sample", *sys.argv[1:]]))
