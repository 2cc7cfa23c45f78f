"""Runs batches through the autoencoder and the text tower, where there are captions."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.conditions.facts import Conditions, MaskFacts
from pipeline.config import EncodeConfig
from pipeline.data.format.records import Record, record_key
from pipeline.errors import NonFinite
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from preprocess.encoding.plan import Unit
from preprocess.source.conditions import Holes, stored_holes, undrawn_arrays
from preprocess.source.recipe import Recipe
from preprocess.source.sample import Picture, Prepared
from preprocess.source.worker import Drawn

HOLES = {"grey": 0.0, "black": -1.0}  # in the range of -1 to 1
TEXT_STEP = 8  # the distinct captions of a batch are padded to a multiple of this many rows, or of a smaller batch


@dataclass
class Item:
    """One record to be: a sample's picture for one target. row: the row number in its key. arrays: those that need no
    encoder, by their stored names. masks: (K, H, W) uint8, or None where there are none or they are not drawn yet."""

    row: int
    sample: Prepared
    target: int
    picture: Picture
    flipped: bool = False
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    masks: np.ndarray | None = None

    def holes(self, unit: int) -> Holes:
        """What its holes are drawn from. unit: number of its unit."""
        return Holes(record_key(unit, self.row), self.picture.crop.size, self.picture.conditions.get("mask"))

    def take(self, packed: np.ndarray, facts: MaskFacts) -> None:
        """Its holes, which `draw_holes` drew."""
        self.arrays["cond.mask"], self.masks = stored_holes(packed, self.picture.crop.size, facts)


def item(
    row: int,
    sample: Prepared,
    target: int,
    facts: Conditions,
    downsampling: int,
    *,
    flipped: bool = False,
) -> Item:
    """The record of a sample's picture for one target, with the arrays that need no encoder but its holes.
    downsampling: pixels per latent position, along a side."""
    picture = sample.pictures[target]
    picture = picture.flipped() if flipped else picture
    arrays = undrawn_arrays(picture.conditions, picture.pixels, facts, downsampling)
    return Item(row, sample, target, picture, flipped, arrays)


@dataclass
class Batch:
    """Items of one unit, target and bucket. position: bytes read so far of the unit's input shard. drawing: the holes
    of its items, in parts, which decoding workers draw."""

    unit: Unit
    target: int
    bucket: int
    items: list[Item]
    position: int
    drawing: list[Future[Drawn]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Keys of its records."""
        return [record_key(self.unit.number, item.row) for item in self.items]


@dataclass
class Encoded:
    """A batch and the encoders' output for it: what is stored of the images, float16 moments (n, 2C, h, w) or latents
    (n, C, h, w), or uint8 pixels (n, 3, H, W); text states (m, L, D) of the m captions of all items, one item's after
    the other's, None when they are not stored; latents of the masked images (n, K, C, h, w), of posteriors their means,
    or (n, C, h, w) of single masks, None without.

    stored: the name of the images' array. retried: whether the autoencoder had to run again in float32. eot: the id
    that ends a caption. seconds: spent in the autoencoder and in the text tower.
    """

    batch: Batch
    stored: str
    images: np.ndarray
    text: np.ndarray | None
    masked: np.ndarray | None
    retried: bool
    eot: int
    seconds: tuple[float, float]

    def records(self, text_storage: str, captions: int = 1) -> list[Record]:
        """The records of the batch. text_storage: full, trimmed, tokens or none. captions: that a record holds, at
        most. Raises NonFinite, which names the sample."""
        records, first = [], 0
        for i, (key, item) in enumerate(zip(self.batch.keys, self.batch.items, strict=True)):
            members = {self.stored: item.picture.pngs[0] if item.picture.pngs else self.images[i]}
            states = None if self.text is None else self.text[first : first + len(item.sample.captions)]
            members |= text_arrays(item.sample, states, text_storage, captions, self.eot)
            first += len(item.sample.captions)
            members |= item.arrays
            if self.masked is not None:
                members["cond.masked"] = self.masked[i]
            for name, array in members.items():
                if array.dtype == np.float16 and not np.isfinite(array).all():
                    unit = self.batch.unit
                    raise NonFinite(
                        f"{name} of sample {item.sample.key} in {unit.storage.locate(unit.key)} holds NaN or infinity, "
                        "in float32 too: check the encoders' weights, or leave the sample out of the source"
                    )
            records.append(Record(key, members, item.sample.meta(item.target, flipped=item.flipped)))
        return records


class Encoder:
    """Autoencoder and text tower. batch: rows of every autoencoder batch; smaller batches are padded. text: None where
    no captions are stored. text_storage: full, trimmed, tokens or none. hole: colour of what masks hide."""

    def __init__(
        self,
        first_stage: FirstStage,
        text: TextTower | None,
        batch: int,
        *,
        text_storage: str = "full",
        hole: str = "grey",
    ) -> None:
        self.first_stage, self.text, self.batch = first_stage, text, batch
        self.text_storage, self.hole = text_storage, hole

    def encode(self, batch: Batch) -> Encoded:
        """Encodes one batch of up to `batch` items."""
        started = time.perf_counter()
        stored, count = self.first_stage.stored, len(batch.items)
        masks = [item.masks for item in batch.items if item.masks is not None]
        pixels = [item.picture.pixels for item in batch.items]
        masked, retried = None, False
        if stored == "pixels":
            arrays = np.stack(pixels).transpose(0, 3, 1, 2)
        if stored != "pixels" or masks:
            images = self._images(pixels)
        if stored != "pixels":
            arrays, retried = self._halves(images, count, lambda stage: stage.encode)
        if masks:
            masked, masked_retried = self._masked(images, np.stack(masks))
            retried |= masked_retried
        encoded = time.perf_counter()
        text = None
        if self.text_storage in ("full", "trimmed"):
            text = self.text_states([one.ids for item in batch.items for one in item.sample.captions])
        seconds = (encoded - started, time.perf_counter() - encoded)
        eot = self.text.eot if self.text else -1
        return Encoded(batch, stored, arrays, text, masked, retried, eot, seconds)

    def text_states(self, ids: list[list[int]]) -> np.ndarray:
        """n rows of L ids -> text states (n, L, D) float16. Equal rows are encoded once."""
        assert self.text is not None, "no captions are stored"
        return text_states(self.text, ids, self.batch)

    def _images(self, pixels: list[np.ndarray]) -> Tensor:
        """n crops (H, W, 3) uint8 -> (batch, 3, H, W) float32 in [-1, 1] on the device; the padding is black."""
        stacked = np.zeros((self.batch, *pixels[0].shape), dtype=np.uint8)
        for i, crop in enumerate(pixels):
            stacked[i] = crop
        pixels_BHWC = torch.from_numpy(stacked)
        if self.first_stage.device.type == "cuda":
            pixels_BHWC = pixels_BHWC.pin_memory()
        return to_unit_range(pixels_BHWC.to(self.first_stage.device, non_blocking=True))

    def _halves(
        self, images_BCHW: Tensor, count: int, method: Callable[[FirstStage], Callable[[Tensor], Tensor]]
    ) -> tuple[np.ndarray, bool]:
        """Returns as float16 what a method of the first stage gives for the first `count` images, and whether it had to
        be computed in float32."""
        values = method(self.first_stage)(images_BCHW)[:count].half()
        retried = self.first_stage.dtype != torch.float32 and not bool(torch.isfinite(values).all())
        if retried:
            values = method(self.first_stage.float32())(images_BCHW)[:count].half()
        return values.cpu().numpy(), retried

    def _masked(self, images_BCHW: Tensor, masks_NKHW: np.ndarray) -> tuple[np.ndarray, bool]:
        """Returns latents of the images with the hole's colour where a mask is 1, of posteriors their means, (N, C, h,
        w) for K = 1, else (N, K, C, h, w), and whether they were computed in float32."""
        count, variants = masks_NKHW.shape[:2]
        means, any_retried = [], False
        for k in range(variants):
            hidden = torch.zeros((len(images_BCHW), 1, *masks_NKHW.shape[2:]), dtype=torch.bool)
            hidden[:count, 0] = torch.from_numpy(masks_NKHW[:, k] > 0)
            images = images_BCHW.masked_fill(hidden.to(images_BCHW.device), HOLES[self.hole])
            latents, retried = self._halves(images, count, lambda stage: stage.mean)
            means.append(latents)
            any_retried |= retried
        return means[0] if variants == 1 else np.stack(means, axis=1), any_retried


def text_arrays(
    sample: Prepared, states: np.ndarray | None, storage: str, captions: int, eot: int
) -> dict[str, np.ndarray]:
    """What a record holds of the captions of a sample, by name. states: (k, L, D) float16 of its k captions, None where
    they are not stored. storage: full, trimmed, tokens or none. captions: that a record holds, at most."""
    if storage == "none":
        return {}
    if captions == 1 and states is None:
        return {"tokens": np.array(sample.ids, dtype=np.int32)}
    ids = {} if captions == 1 else {"captions": sample.ids_of_all(captions)}
    if states is None:
        return ids
    if storage == "trimmed":
        ends = [one.ids.index(eot) + 1 for one in sample.captions]
        return {**ids, "text": np.concatenate([one[:end] for one, end in zip(states, ends, strict=True)])}
    if captions == 1:
        return {"text": states[0]}
    text = np.zeros((captions, *states.shape[1:]), dtype=states.dtype)
    text[: len(states)] = states
    return {**ids, "text": text}


def text_states(tower: TextTower, ids: list[list[int]], batch: int) -> np.ndarray:
    """n rows of L ids -> text states (n, L, D) float16. Equal rows are encoded once. batch: most rows at a time, up to
    a step more."""
    unique: dict[tuple[int, ...], int] = {}
    places = [unique.setdefault(tuple(row), len(unique)) for row in ids]
    rows, step = list(unique), min(TEXT_STEP, batch)
    rows += rows[-1:] * (-len(rows) % step)
    most = -(-batch // step) * step  # several captions of an image are more than fit at once
    parts = [torch.tensor(rows[first : first + most], dtype=torch.int64) for first in range(0, len(rows), most)]
    states = [tower.encode(part).half().cpu().numpy() for part in parts]
    return np.concatenate(states)[places]


def encoder_of(config: EncodeConfig, recipe: Recipe, stage: FirstStage, text: TextTower | None) -> Encoder:
    """The encoder that a configuration asks for."""
    mask = recipe.conditions.mask
    return Encoder(stage, text, config.batch, text_storage=config.text_kind, hole=mask.hole if mask else "grey")


def to_unit_range(pixels_BHWC: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return pixels_BHWC.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
