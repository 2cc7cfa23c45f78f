"""Which pictures are cut into tiles, and how large those are: tile=off, a number of pixels, or auto, by memory.

The memory of a picture is that of planning/inference.py, and what is free is asked of the device. Nothing here needs
weights, so that a picture which is too large is refused before any are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from pipeline.config import EncodersConfig, ModelConfig, SamplerConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.errors import ConfigError
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.inference.tiles.stage import TOGETHER, TiledStage
from pipeline.log import log
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import DTYPES, described_network
from pipeline.models.encoders.first_stage import FirstStage, NetworkStage
from pipeline.planning.cost import unet_cost
from pipeline.planning.inference import StageShape, decode_bytes, denoise_bytes, stage_shape, tile_bytes

SHARE = 0.7
"""Part of the free memory that is planned with. The model of memory is good to 15 %, and allocators keep more."""
STEP = 8
"""Latent positions by which tiles are made smaller until one fits."""
QUARTER = 4
"""Windows of denoising share the fourth part of a side with each neighbour."""

GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Tiles:
    """Sides of tiles in pixels, 0 where pictures are whole.

    downsampling, stride: of the latents and the UNet. rows: of the network's batch in denoising, at most. at_once:
    latent positions of whole pictures that are decoded at once; 0 = all of a batch.
    """

    denoise: int = 0
    decode: int = 0
    downsampling: int = 1
    stride: int = 1
    rows: int = 1
    at_once: int = 0

    @property
    def facts(self) -> dict[str, int]:
        """The sides that are not 0, for cards: all that pictures depend on, but for rounding."""
        return {name: side for name, side in (("denoise", self.denoise), ("decode", self.decode)) if side}

    def words(self) -> str:
        """The same for people."""
        whole = {"denoise": "denoising", "decode": "decoding"}
        return ", ".join(f"{word} in tiles of {self.facts[name]}" for name, word in whole.items() if name in self.facts)

    def denoiser(self, denoiser: Denoiser) -> Denoiser | TiledDenoiser:
        """What predicts in these tiles."""
        side = self.denoise // self.downsampling
        if not side:
            return denoiser
        overlap = max(1, side // self.stride // QUARTER) * self.stride
        return TiledDenoiser(denoiser, side, overlap, self.rows)

    def stage(self, stage: FirstStage) -> FirstStage:
        """What decodes and encodes in these tiles."""
        if not isinstance(stage, NetworkStage) or not (self.decode or self.at_once):
            return stage
        side = self.decode // stage.downsampling or WHOLE_SIDE
        return TiledStage(stage, side, None if self.decode else 0, at_once=self.at_once)


WHOLE = Tiles()
WHOLE_SIDE = 1 << 30
"""A side that no picture has."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn: pictures of `sizes` (width, height) in pixels by a model of `task` that was trained on `cache`, in
    batches. encoders: what decodes them."""

    model: ModelConfig
    task: TaskConfig
    cache: Cache
    encoders: EncodersConfig
    sampler: SamplerConfig
    sizes: Sequence[tuple[int, int]]
    pictures: int
    """Number of pictures in all."""

    @property
    def batch(self) -> int:
        return min(self.sampler.batch, self.pictures)

    @property
    def rows(self) -> int:
        """Rows of the network's batch."""
        return self.batch * (2 if self.sampler.guidance != 1 else 1)

    @property
    def stride(self) -> int:
        """What sides of latents are multiples of."""
        return 2 ** (len(self.model.multipliers) - 1)

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width of the largest latents."""
        width, height = max(self.sizes, key=lambda size: size[0] * size[1])
        return height // self.cache.downsampling, width // self.cache.downsampling

    def stage(self) -> StageShape | None:
        """The autoencoder's architecture, by its configuration alone; None where latents are pixels."""
        config = described_network(self.encoders)
        return None if config is None else stage_shape(config)

    def denoising(self, rows: int, height: int, width: int) -> int:
        """Bytes of activations of a prediction for latents of height x width."""
        return denoise_bytes(self._whole_model(), rows, height, width, self.task.tokens(self.cache))

    def weights(self, stage: StageShape | None) -> int:
        """Bytes of the weights of UNet and autoencoder."""
        cost = unet_cost(self._whole_model(), 1, self.stride, self.stride, 1)
        return 4 * cost.parameters + (self.element * stage.parameters if stage is not None else 0)

    @property
    def element(self) -> int:
        """Bytes of the autoencoder's activations."""
        return DTYPES[self.encoders.vae_dtype].itemsize

    def tiles(self, sides: Mapping[str, int], room: int | None = None, at_once: int = 0) -> Tiles:
        """Tiles of these sides in pixels, by name. room: bytes for a prediction; None = as many rows at once as in a
        batch of whole pictures."""
        (height, width), factor = self.largest, self.cache.downsampling
        cut = {name: side for name, side in sides.items() if 0 < side < max(height, width) * factor}
        denoise, rows = cut.get("denoise", 0), self.rows
        if denoise and room is not None:
            side = denoise // factor
            rows = max(1, min(rows, room // self.denoising(1, min(side, height), min(side, width))))
        if denoise and not self.task.channels(self.cache):
            log.warning(
                f"tiles of {denoise} pixels: nothing tells a model of task={self.task.name} what lies where, so that "
                "each tile draws all of it"
            )
        return Tiles(denoise, cut.get("decode", 0), factor, self.stride, rows, at_once)

    def _whole_model(self) -> ModelConfig:
        return replace(self.model, in_channels=self.model.in_channels + self.task.channels(self.cache))


def choose(tile: str, drawn: Drawn, device: torch.device) -> Tiles:
    """The tiles that `tile` (off, auto or pixels) means on this device.

    Raises ConfigError for pixels that the model cannot take, and with tile=off for pictures that cannot fit the memory
    that is free.
    """
    free, stage = free_bytes(device), drawn.stage()
    if tile == "off":
        _require_room(drawn, stage, free)
        return WHOLE
    factor, (height, width) = drawn.cache.downsampling, drawn.largest
    unit = factor * drawn.stride
    room = max(0, round(SHARE * free) - drawn.weights(stage))
    if tile == "auto":
        trained = max(drawn.cache.latent_shape[1:])
        windowed = drawn.denoising(drawn.rows, height, width) > room and max(height, width) > trained
        denoise = trained * factor if windowed else 0
        decode, at_once = _decoding(drawn, stage, room) if stage is not None else (0, 0)
    else:
        denoise = decode = int(tile)
        at_once = 0
        if denoise % unit or denoise < 2 * unit:
            nearest = max(2, round(denoise / unit)) * unit
            raise ConfigError(
                f"tile={tile}: tiles of this model have sides of {2 * unit} pixels or more, multiples of {unit}; the "
                f"nearest is {nearest}"
            )
        if stage is None:
            decode = 0
    return drawn.tiles({"denoise": denoise, "decode": decode}, room, at_once)


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on a device; on the CPU those that the machine, and a control group, still have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        most = int((GROUP / "memory.max").read_text(encoding="ascii"))
        taken = int((GROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, min(free, most - taken + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):  # no control group, or one without a limit
        return free


def _decoding(drawn: Drawn, stage: StageShape, room: int) -> tuple[int, int]:
    """Side of tiles in pixels, or 0, and latent positions to decode at once, or 0, for auto."""
    (height, width), batch, element = drawn.largest, drawn.batch, drawn.element
    if decode_bytes(stage, batch, height, width, element) <= room:
        return 0, 0
    one = decode_bytes(stage, 1, height, width, element)
    if one <= room:
        return 0, room // one * height * width
    side = max(height, width)
    side -= side % STEP or STEP
    while side > 2 * STEP:
        if tile_bytes(stage, height, width, side, batch, max(1, TOGETHER // side**2), element) <= room:
            break
        side -= STEP
    return max(side, STEP) * drawn.cache.downsampling, 0


def _require_room(drawn: Drawn, stage: StageShape | None, free: int) -> None:
    """Raise ConfigError unless a batch of the largest pictures can fit the free memory."""
    height, width = drawn.largest
    works = {"denoise": drawn.denoising(drawn.rows, height, width)}
    if stage is not None:
        works["decode"] = decode_bytes(stage, drawn.batch, height, width, drawn.element)
    work = max(works, key=works.__getitem__)
    if works[work] > free:
        many = f"{drawn.batch} images" if drawn.batch > 1 else "an image"
        raise ConfigError(
            f"{many} of {width * drawn.cache.downsampling} x {height * drawn.cache.downsampling} pixels at once would "
            f"take about {works[work] / 1e9:.3g} GB of memory to {work}, and {free / 1e9:.3g} GB are free here: give "
            "tile=auto"
        )
