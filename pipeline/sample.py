"""latentmill sample: images from a checkpoint, as one picture with a row per caption."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from pipeline.config import SampleConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.pictures import draw
from pipeline.evaluation.trained import encode_captions, load_trained
from pipeline.malloc import keep_memory
from pipeline.models.text import TextTower
from pipeline.progress import Progress
from pipeline.report.grid import captioned, png
from pipeline.storage import open_storage, split_url
from pipeline.training.distributed import pick_device


def main(config: SampleConfig) -> int:
    """The verb."""
    prompts = list(config.prompt) or [""]
    images = sample_images(config, prompts)
    root, key = split_url(config.dest)
    open_storage(root).put(key, png(captioned(images, prompts)))
    print(f"sample: {config.dest}: {images.shape[1]} images for each of {len(prompts)} captions")
    return 0


def sample_images(config: SampleConfig, prompts: list[str]) -> np.ndarray:
    """config.n images for each prompt: (prompts, n, H, W, 3) uint8.

    Image k of prompt r starts from the noise of (seed, r n + k). An unconditional model takes no prompt but "".
    """
    if config.n < 1:
        raise ConfigError(f"n={config.n}: at least one image per caption")
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_memory()
    trained = load_trained(config.run, config.at, config.weights)
    run = trained.info.config
    if run.task.name == "unconditional" and any(prompts):
        raise ConfigError(f"{config.run} is unconditional and takes no prompt")
    first_stage, tower = trained.encoders(device, config.encoders)
    warn_of_long(prompts, tower)
    trimmed = trained.contract.trimmed
    states_BLD = encode_captions(tower, prompts, trimmed=trimmed).to(device)
    denoiser = trained.denoiser(encode_captions(tower, [""], trimmed=trimmed)[0].to(device), device)
    sampler = replace(config.sampler, guidance=config.guidance) if config.guidance else config.sampler
    total = len(prompts) * config.n
    pictures = []
    with Progress(total, "sample", "images") as progress:
        for start in range(0, total, sampler.batch):
            numbers = list(range(start, min(start + sampler.batch, total)))
            text = states_BLD[[number // config.n for number in numbers]]
            images, broken = draw(
                denoiser,
                first_stage,
                run.diffusion,
                sampler,
                denoiser.task.condition({"text": text}),
                numbers,
                config.seed,
                trained.contract.latent_shape,
                device,
            )
            pictures.append(images)
            progress.update(len(numbers))
            if broken:
                print(f"warning: {broken} of {len(numbers)} images are not finite", file=sys.stderr, flush=True)
    stacked = np.concatenate(pictures)
    return stacked.reshape(len(prompts), config.n, *stacked.shape[1:])


def warn_of_long(prompts: list[str], tower: TextTower) -> None:
    """Say which captions are longer than the context: their rest is not read, as in training and in diffusers."""
    for prompt in prompts:
        tokens = tower.ids(prompt)[1]
        if tokens > tower.length:
            shown = f"{prompt[:40]}..." if len(prompt) > 43 else prompt
            print(
                f"warning: the caption {shown!r} has {tokens} tokens with start and end, and the model reads "
                f"{tower.length}: its last {tokens - tower.length} are left out",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["sample", *sys.argv[1:]]))
