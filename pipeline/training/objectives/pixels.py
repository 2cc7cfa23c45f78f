"""The pictures that an autoencoder is trained on: pixels of caches, and what is cut out of them for each sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config import AutoencoderConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.runs.datasets import PIXELS, require_pixels
from pipeline.runs.directory import dataset_urls
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage
from pipeline.training.inputs import Data, datasets, streamed

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.distributed.world import World


def open_pixels(config: AutoencoderConfig, run: Storage, world: World, members: tuple[str, ...] = ()) -> Data:
    """Open the datasets of an autoencoder's run, as one rank. members: arrays that further losses read. Raises
    LatentmillError where they do not fit, or are not there."""
    dataset, validation = datasets(config, run, world)
    contracts = [part.manifest.contract for part in dataset.parts]
    for where, contract in zip(_places(config), [*contracts, *([validation.contract] if validation else [])]):
        require_pixels(config, contract, where)
    return Data(*streamed(config, dataset, validation, (PIXELS, *members), world))


def check_caches(config: AutoencoderConfig) -> None:
    """Raise LatentmillError where the caches do not fit, before any process starts. Loads no PyTorch."""
    val = (config.data.val,) if config.data.val else ()
    for url, where in zip((*dataset_urls(config.data), *val), _places(config)):
        require_pixels(config, load_manifest(open_storage(url)).contract, where)


def _places(config: AutoencoderConfig) -> Iterator[str]:
    """Of every cache, how messages name it."""
    for number, url in enumerate(dataset_urls(config.data)):
        yield f"data.{'mix' if number else 'train'}={url}"
    if config.data.val:
        yield f"data.val={config.data.val}"


def corners(seed: int, numbers: Tensor, size: tuple[int, int], crop: int) -> Tensor:
    """(b, 2) int64 on the CPU: top and left of the square that each sample number (b,) cuts out of a picture of size
    (H, W). All places are equally likely."""
    import torch

    from pipeline import philox

    draws = philox.uniform(seed, philox.Stream.CROP, numbers, 2)
    return (draws * torch.tensor([side - crop + 1 for side in size])).long()


def flips(seed: int, numbers: Tensor) -> Tensor:
    """(b,) bool: whether each sample number (b,) sees its picture flipped left to right; every second one does."""
    from pipeline import philox

    return philox.uniform(seed, philox.Stream.FLIP, numbers)[:, 0] < 0.5


def cut(pixels_B3HW: Tensor, corners_B2: Tensor, crop: int) -> Tensor:
    """The squares (b, 3, crop, crop) at these corners."""
    import torch

    pairs = zip(pixels_B3HW, corners_B2.tolist(), strict=True)
    return torch.stack([picture[:, top : top + crop, left : left + crop] for picture, (top, left) in pairs])
