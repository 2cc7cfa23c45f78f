"""latentmill sample: images from a checkpoint, as one picture with a row per caption."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.config import SampleConfig
from pipeline.config.tasks import TASK_FACTS
from pipeline.data.format.contract import Contract
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.world import pick_device
from pipeline.errors import ConfigError
from pipeline.inference.pictures import draw
from pipeline.inference.trained import encode_captions, load_trained
from pipeline.log import log, show
from pipeline.models.encoders.text import TextTower
from pipeline.report.grid import captioned, png
from pipeline.storage.urls import open_storage, split_url
from pipeline.tracking.progress import Progress


def main(config: SampleConfig) -> int:
    """Run the verb."""
    prompts = list(config.prompt) or [""]
    rows = sample_rows(config, prompts)
    root, key = split_url(config.dest)
    open_storage(root).put(key, png(captioned(rows, prompts)))
    show(f"sample: {config.dest}: {config.n} images for each of {len(prompts)} captions")
    return 0


def sample_rows(config: SampleConfig, prompts: list[str]) -> list[np.ndarray]:
    """config.n images for each prompt: (n, H, W, 3) uint8 each, in the prompt's own size.

    Image k of prompt r starts from the noise of (seed, r n + k) for any division into batches. Other batches change a
    pixel by one level of 255 at most, by rounding. An unconditional model takes only the prompt "".
    """
    if config.n < 1:
        raise ConfigError(f"n={config.n}: at least one image per caption")
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_memory()
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    run, contract = trained.info.config, trained.contract
    if not TASK_FACTS[run.task.name].needs_text and (any(prompts) or config.negative):
        raise ConfigError(f"{config.run} is unconditional and takes no prompt")
    shapes = latent_shapes(config.size, len(prompts), contract, 2 ** (len(run.model.multipliers) - 1))
    first_stage, tower = trained.encoders(device, config.encoders)
    warn_of_long([*prompts, config.negative], tower)
    states_BLD = encode_captions(tower, [*prompts, config.negative, ""], trimmed=contract.trimmed).to(device)
    denoiser = trained.denoiser(states_BLD[-1], device, packed=True)
    task = denoiser.task
    sampler = replace(config.sampler, guidance=config.guidance) if config.guidance else config.sampler
    pictures: dict[int, np.ndarray] = {}
    total = len(prompts) * config.n
    with Progress(total, "sample", "images") as progress:
        for shape in dict.fromkeys(shapes):
            numbers_of_shape = [number for number in range(total) if shapes[number // config.n] == shape]
            for start in range(0, len(numbers_of_shape), sampler.batch):
                numbers = numbers_of_shape[start : start + sampler.batch]
                negative = states_BLD[[len(prompts)] * len(numbers)]
                images, not_finite = draw(
                    denoiser,
                    first_stage,
                    run.diffusion,
                    sampler,
                    task.condition({"text": states_BLD[[number // config.n for number in numbers]]}),
                    numbers,
                    config.seed,
                    shape,
                    device,
                    task.condition({"text": negative}) if config.negative else None,
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
        sides = [int(side) for side in size.split("x")]
        if any(side % multiple for side in sides):
            nearest = "x".join(str(max(round(side / multiple), 1) * multiple) for side in sides)
            raise ConfigError(f"size={size}: this model makes multiples of {multiple} pixels; the nearest is {nearest}")
        shapes.append((channels, sides[1] // contract.downsampling, sides[0] // contract.downsampling))
    return shapes if len(shapes) == count else shapes * count


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
