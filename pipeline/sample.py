"""latentmill sample: images from a checkpoint, as one picture with a row per caption, class or file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.config import SampleConfig, SamplerConfig, TaskConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.contract_json import contract_from_json
from pipeline.distributed.allocator import keep_memory
from pipeline.distributed.world import pick_device
from pipeline.errors import ConfigError, DestinationExists
from pipeline.inference.picture_file import MOST_PIXELS, encoded, format_of, is_ours, require_room
from pipeline.inference.pictures import conditionings, draw
from pipeline.inference.precision import precision_of, products
from pipeline.inference.requests.captions import Captions
from pipeline.inference.requests.request import Request, make_requests, sides
from pipeline.inference.steering.images import of_images
from pipeline.inference.steering.per_batch import Steering, joined
from pipeline.inference.steering.rows import Guides
from pipeline.inference.tiles.choice import Drawn, choose
from pipeline.inference.trained import load_trained, located_encoders
from pipeline.log import log, show
from pipeline.models.tasks.task import Task
from pipeline.report.grid import MARGIN, PAPER, captioned, captioned_size
from pipeline.runs.checkpoint import load_run
from pipeline.storage.base import Storage
from pipeline.storage.staging import require_place, require_writable
from pipeline.storage.urls import open_storage, split_url
from pipeline.tracking.progress import Progress


@dataclass(frozen=True)
class Row:
    """A row of the picture: what it was asked to show, and its images (n, H, W, 3) uint8."""

    request: Request
    images: np.ndarray


def main(config: SampleConfig) -> int:
    """Run the verb."""
    storage, key = look(config)
    rows = sample_rows(config)
    images = [
        row.request.over(row.images) if row.request.over is not None and config.draw_boxes else row.images
        for row in rows
    ]
    picture = captioned(images, [row.request.label for row in rows], [row.request.shown for row in rows])
    storage.put(key, encoded(picture, format_of(config.dest)))
    show(f"sample: {config.dest}: {len(rows)} {'rows' if len(rows) > 1 else 'row'} of {config.n} images")
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


def sample_rows(config: SampleConfig) -> list[Row]:
    """config.n images for each row that is asked for, in the row's own size.

    Image k of row r starts from the noise of (seed, r n + k) for any division into batches. Other batches change a
    pixel by one level of 255 at most, by rounding.
    """
    with products(tf32=False):  # what is given is encoded as that of a cache
        return _rows(config)


def _rows(config: SampleConfig) -> list[Row]:
    if config.n < 1:
        raise ConfigError(f"n={config.n}: at least one image in a row")
    kind = format_of(config.dest)
    sizes = [sides(size) for size in config.size] or [(1, 1)]
    require_room(kind, *captioned_size(config.n, sizes if len(sizes) == config.rows else sizes * config.rows))
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_memory()
    info = load_run(config.run)  # its weights are read once all that is asked for is known to be possible
    run, contract = info.config, contract_from_json(info.contract)
    sampler = sampler_of(config, run.task)
    asked = make_requests(run.task, contract, 2 ** (len(run.model.multipliers) - 1))
    guides = Guides(config, run, contract)
    requests = guides.shown(asked.rows(config))
    shown = any(request.shown is not None for request in requests)
    require_room(kind, *captioned_size(config.n, [request.size for request in requests], shown=shown))
    sizes = [request.size for request in requests]
    encoders = located_encoders(info, config.encoders)
    wanted = Drawn(run.model, run.task, contract, encoders, sampler, sizes, len(requests) * config.n)
    tiles = choose(config.tile, wanted, device)
    if config.tile == "auto":
        show(f"sample: {tiles.words() or 'whole pictures'}")
    trained = load_trained(config.run, config.at, config.weights, config.ema)
    first_stage, tower = trained.encoders(device, config.encoders)
    first_stage = tiles.stage(first_stage)
    requests = [asked.encoded(request, first_stage) for request in requests]
    captions = Captions(config, run.task, contract, tower, device)
    steering: tuple[Steering, ...] = (
        *of_images(requests, config.strength, first_stage, contract),
        *guides.steering(first_stage, tower, device),
    )
    packed = not any(one.gradients for one in steering)
    precision = precision_of(config.precision, config.tf32, device)
    denoiser = tiles.denoiser(trained.denoiser(captions.empty, device, packed=packed, dtype=precision.dtype))
    channels, factor = contract.latent_shape[0], contract.downsampling
    shapes = [(channels, height // factor, width // factor) for width, height in (request.size for request in requests)]
    pictures: dict[int, np.ndarray] = {}
    total = len(requests) * config.n
    with Progress(total, "sample", "images") as progress, products(precision.tf32):
        for shape in dict.fromkeys(shapes):
            numbers_of_shape = [number for number in range(total) if shapes[number // config.n] == shape]
            for start in range(0, len(numbers_of_shape), sampler.batch):
                numbers = numbers_of_shape[start : start + sampler.batch]
                rows = [number // config.n for number in numbers]
                batch = {**members_of([requests[row] for row in rows], contract, device), **captions.of(rows)}
                prepared = prepare(denoiser.task, batch, config.seed, numbers, shape, device)
                conditioning, null = conditionings(denoiser, prepared, sampler, captions.negative(len(rows)))
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
                    null,
                    joined(one.hooks(numbers, rows, shape) for one in steering),
                )
                pictures |= zip(numbers, images, strict=True)
                progress.update(len(numbers))
                if not_finite:
                    log.warning(f"{not_finite} of {len(numbers)} images are not finite")
    drawn = [np.stack([pictures[r * config.n + k] for k in range(config.n)]) for r in range(len(requests))]
    return [
        Row(request, images if request.finish is None else request.finish(images))
        for request, images in zip(requests, drawn, strict=True)
    ]


def sampler_of(config: SampleConfig, task: TaskConfig) -> SamplerConfig:
    """How images are sampled. A model that was trained with its condition alone is sampled without guidance; raises
    ConfigError where guidance, or a negative prompt, is asked of it."""
    guidance = config.sampler.guidance if config.guidance is None else config.guidance
    if task.droppable and task.drop > 0:
        return replace(config.sampler, guidance=guidance)
    why = (
        f"the model was trained with task.drop={task.drop:g}"
        if task.droppable
        else f"a model of task={task.name} has nothing that it could do without"
    )
    if guidance != 1 and (config.guidance is not None or guidance != SamplerConfig().guidance):
        raise ConfigError(
            f"guidance={guidance:g}: {why}, so that there is nothing to lead away from: leave guidance out, or give "
            "guidance=1"
        )
    if config.negative and task.takes_text:
        raise ConfigError(f"negative: {why}, and is sampled without guidance: leave negative out")
    return replace(config.sampler, guidance=1.0)


def members_of(requests: Sequence[Request], contract: Contract, device: torch.device) -> dict[str, Tensor]:
    """The members of a batch with a row for each request, (B, ...) as stored: an array of which a cache stores K
    variants has K equal ones. What a cache does not store stays as it is."""
    stored = {member.name: member for member in contract.members}
    batch = {}
    for name in requests[0].members:
        tensor = torch.from_numpy(np.stack([request.members[name] for request in requests])).to(device)
        shape = stored[name].shape if name in stored else ()
        if len(shape) == tensor.ndim:  # without the batch, an axis more: that of the variants
            tensor = tensor[:, None].expand(-1, shape[0], *tensor.shape[1:])
        batch[name] = tensor
    return batch


def prepare(
    task: Task,
    batch: Mapping[str, Tensor],
    seed: int,
    numbers: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device,
) -> dict[str, Tensor]:
    """The batch as the task's `forward` takes it. shape: (C, h, w) of its latents."""
    numbers_B = torch.tensor(numbers, dtype=torch.int64, device=device)
    return task.prepare(batch, seed, numbers_B, sides=shape[1:], training=False)


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["sample", *sys.argv[1:]]))
