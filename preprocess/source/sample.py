"""Turns one source sample into the input of the encoders, or into a reason of rejection (docs/explained/promises.md,
4)."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import FiltersConfig
from pipeline.config.values.rules import parse_rules
from pipeline.data.format.members import NO_CAPTION
from pipeline.data.format.pixels import png_bytes
from pipeline.errors import RecordRejected
from preprocess.colour.profiles import Outcome
from preprocess.filters.phash import perceptual_hash
from preprocess.source.columns import read_columns
from preprocess.source.conditions import flipped, read_conditions
from preprocess.source.image import (
    MOST_CROPS,
    Crop,
    cut,
    decode_colours,
    open_image,
    place_crop,
    refuse_resized,
    resize_image,
)
from preprocess.source.recipe import Recipe
from preprocess.source.shard import PROBLEMS, Sample

DIGEST_BYTES = 16
BYTE_ORDER_MARK = "\ufeff"
INVISIBLE = frozenset(["Cc", "Cf", "Mn", "Me"])  # Unicode categories that show nothing by themselves
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters that are blank
NO_WORDS = 2  # tokens of a caption without words: start and end
OF_ONE_CAPTION = Recipe(targets=())
"""How a caption is read where a record has one."""
FILTERED = "filter:"  # prefix of the reasons of intact samples that a filter rejects


@dataclass
class Picture:
    """The image of a sample for one target.

    bucket: index of its size in the target's sizes. pixels: (height, width, 3) uint8 RGB. conditions: what
    `read_conditions` gave. cut_boxes: how many boxes of the sample it lacks, as they were too many or too small. pngs:
    the bytes (N,) uint8 of the pixels as a PNG, and of the flipped pixels, as far as the recipe wants them. looks: the
    perceptual hash, of the pixels as they were before any flip; b"" where near-duplicates are kept.
    """

    bucket: int
    crop: Crop
    pixels: np.ndarray
    conditions: dict[str, np.ndarray] = field(default_factory=dict)
    cut_boxes: int = 0
    pngs: tuple[np.ndarray, ...] = ()
    looks: bytes = b""

    def flipped(self) -> Picture:
        """The picture with left and right exchanged. Its crop still refers to the image that was not flipped."""
        conditions, pngs = flipped(self.conditions), self.pngs[::-1]
        return Picture(self.bucket, self.crop, self.pixels[:, ::-1], conditions, self.cut_boxes, pngs, self.looks)


@dataclass(frozen=True)
class Caption:
    """A caption of a sample. key: number of the place that it was read from, among those of the recipe. ids, tokens:
    its L token ids, and their number with start and end, before truncation."""

    text: str
    key: int
    ids: list[int]
    tokens: int

    @property
    def truncated(self) -> bool:
        """Whether the context is too short for it."""
        return self.tokens > len(self.ids)


@dataclass
class Prepared:
    """A sample ready for the encoders.

    captions: in the order of the places where they were read; none where none are taken. size: (width, height) of the
    upright original in pixels. digest: equal for duplicates, b"" when duplicates are kept. pictures: one per target.
    profile: what became of its colour profile. whole: the picture that its CLIP score is of, (H, W, 3) uint8, where
    there is that filter. several: whether records hold several captions. cut_captions: how many it has that its records
    lack, as they are too many.
    """

    key: str
    captions: list[Caption]
    size: tuple[int, int]
    digest: bytes
    pictures: list[Picture]
    profile: Outcome = ""
    whole: np.ndarray | None = None
    several: bool = False
    cut_captions: int = 0

    @property
    def caption(self) -> str:
        """The first caption, "" where none are taken."""
        return self.captions[0].text if self.captions else ""

    @property
    def ids(self) -> list[int]:
        """Its token ids."""
        return self.captions[0].ids if self.captions else []

    @property
    def tokens(self) -> int:
        """Its number of tokens, with start and end and before truncation."""
        return self.captions[0].tokens if self.captions else 0

    def ids_of_all(self, most: int) -> np.ndarray:
        """The array `captions` of its records, (most, 1 + L) int32: key and token ids of each caption."""
        rows = np.full((most, 1 + len(self.ids)), NO_CAPTION, dtype=np.int32)
        for row, one in zip(rows, self.captions, strict=False):
            row[0], row[1:] = one.key, one.ids
        return rows

    def meta(self, target: int = 0, *, flipped: bool = False) -> dict[str, Any]:
        """The json of the record. Its crop is (left, top, width, height) in pixels of the image after resizing to
        `resized` and before any flip."""
        crop = self.pictures[target].crop
        meta = {
            "key": self.key,
            "caption": self.caption,
            "tokens": min(self.tokens, len(self.ids)),
            "truncated": any(one.truncated for one in self.captions[:1]),
            "width": crop.width,
            "height": crop.height,
            "resized": list(crop.resized),
            "crop": list(crop.box),
        }
        meta |= {"captions": [one.text for one in self.captions]} if self.several else {}
        return meta | ({"flipped": True} if flipped else {})


def prepare(sample: Sample, recipe: Recipe, tokenize: Callable[[str], tuple[list[int], int]] | None) -> Prepared:
    """Reads, checks and crops one sample. tokenize: None where the recipe takes no captions. Raises RecordRejected with
    the first reason that applies."""
    if sample.problem:
        raise RecordRejected(sample.problem, PROBLEMS[sample.problem])
    data = sample.image()
    read, left_out = read_captions(sample, recipe)
    texts = [text for _, text in read]
    refuse_unwanted(sample, texts, recipe.filters)
    opened = open_image(data, recipe.limits)
    refuse_size(opened.size, recipe.filters)
    refuse_thin(opened.size, sample.key, recipe)
    captions = [Caption(text, key, *(tokenize(text) if tokenize else ([], 0))) for key, text in read]
    if tokenize is not None and any(one.tokens <= NO_WORDS for one in captions):
        raise RecordRejected("caption_empty", "it has no token")
    image, profile = decode_colours(opened, data, recipe.colour)
    columns = metadata(sample) if recipe.reads_columns else {}
    pictures = []
    for bucket, crop in crops(image.size, sample.key, recipe):
        refuse_resized(crop, recipe.limits)
        resized = resize_image(image, crop)
        pixels = np.asarray(cut(resized, crop))
        found = read_conditions(sample, columns, recipe.conditions, crop, pixels, recipe.limits, recipe.colour)
        both = (pixels, pixels[:, ::-1])[: recipe.variants]
        pngs = tuple(map(png_bytes, both)) if recipe.png else ()
        looks = looks_of(resized, crop) if recipe.filters.near_duplicates else b""
        pictures.append(Picture(bucket, crop, pixels, *found, pngs, looks))
    digest = content_digest(data, "\0".join(texts), recipe.filters.duplicates)
    whole = whole_picture(image, recipe.whole) if any(recipe.whole) else None
    several = recipe.captions > 1
    return Prepared(sample.key, captions, image.size, digest, pictures, profile, whole, several, left_out)


def looks_of(resized: Image.Image, crop: Crop) -> bytes:
    """The perceptual hash of the middle of a resized image, in the size of its crop, wherever that is cut: so copies
    of one picture have one hash with random crops, too."""
    left, top = ((resized.size[i] - crop.size[i]) // 2 for i in range(2))
    return perceptual_hash(resized.crop((left, top, left + crop.size[0], top + crop.size[1])))


def whole_picture(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The largest part in the middle of an image that has the shape of `size` (width, height), resized to it as
    open_clip does: (height, width, 3) uint8."""
    scale = min(image.size[i] / size[i] for i in range(2))
    left, top = (max(0.0, (image.size[i] - size[i] * scale) / 2) for i in range(2))
    box = (left, top, min(left + size[0] * scale, image.width), min(top + size[1] * scale, image.height))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box))


def crops(size: tuple[int, int], key: str, recipe: Recipe) -> Iterator[tuple[int, Crop]]:
    """Bucket and crop for each target of an upright image of `size` (width, height)."""
    for target in recipe.targets:
        bucket = target.nearest(*size)
        yield bucket, place_crop(*size, target.sizes[bucket], recipe.crop, recipe.seed, key)


def refuse_thin(size: tuple[int, int], key: str, recipe: Recipe) -> None:
    """Raises RecordRejected, image_too_large, for an image that is too thin to be resized, whichever way up it is;
    before any pixel is decoded."""
    if max(size) <= MOST_CROPS * min(size):
        return
    try:
        for _, crop in crops(size, key, recipe):
            refuse_resized(crop, recipe.limits)
    except RecordRejected as rejection:
        try:
            for _, crop in crops(size[::-1], key, recipe):
                refuse_resized(crop, recipe.limits)
        except RecordRejected:
            raise rejection from None


def refuse_unwanted(sample: Sample, texts: Sequence[str], filters: FiltersConfig) -> None:
    """Raises RecordRejected for a sample that a filter on a caption or the json excludes: filter:min_caption,
    filter:max_caption, filter:RULE or column_missing:KEY."""
    if any(len(text) < filters.min_caption for text in texts):
        raise RecordRejected(f"{FILTERED}min_caption")
    if filters.max_caption and any(len(text) > filters.max_caption for text in texts):
        raise RecordRejected(f"{FILTERED}max_caption")
    columns = metadata(sample) if filters.keep else {}
    for rule in parse_rules(filters.keep):
        holds = rule.holds(columns.get(rule.key))
        if holds is None:
            raise RecordRejected(f"column_missing:{rule.key}", "it is not there, or cannot be compared")
        if not holds:
            raise RecordRejected(f"{FILTERED}{rule}")


def refuse_size(size: tuple[int, int], filters: FiltersConfig) -> None:
    """Raises RecordRejected for a size (width, height) that a filter excludes: filter:min_side or filter:max_aspect."""
    if min(size) < filters.min_side:
        raise RecordRejected(f"{FILTERED}min_side")
    if filters.max_aspect and max(size) > filters.max_aspect * min(size):
        raise RecordRejected(f"{FILTERED}max_aspect")


def content_digest(data: bytes, text: str, duplicates: str) -> bytes:
    """A hash of DIGEST_BYTES that duplicates have in common, or b"" when duplicates are kept. text: the captions."""
    if duplicates == "keep":
        return b""
    digest = hashlib.sha256(data)
    if duplicates == "pair":
        digest.update(b"\0" + text.encode())
    return digest.digest()[:DIGEST_BYTES]


def read_captions(sample: Sample, recipe: Recipe) -> tuple[list[tuple[int, str]], int]:
    """The captions of a sample, without surrounding white space, each with the number of its place among
    recipe.caption_keys, in the order of the places; and how many further ones there are.

    Of more than recipe.captions the first of each place are taken, then the second, and so on. Raises RecordRejected.
    """
    columns = metadata(sample) if any(place != "txt" for place in recipe.caption_keys) else {}
    values = [values_at(place, sample, columns, recipe) for place in recipe.caption_keys]
    taken = shared_out([len(found) for found in values], recipe.captions)
    texts = [
        (key, cleaned(data, recipe.limits.caption_bytes))
        for key, count in enumerate(taken)
        for data in values[key][:count]
    ]
    return texts, sum(map(len, values)) - sum(taken)


def values_at(place: str, sample: Sample, columns: Mapping[str, Any], recipe: Recipe) -> list[bytes]:
    """What is found at a place of captions, one at least. columns: of the sample's json. Raises RecordRejected."""
    where = f"{place}: " if recipe.captions > 1 else ""
    if place == "txt":
        if "txt" not in sample.members:
            raise RecordRejected("caption_missing", where + sample.files)
        return [sample.members["txt"]]
    value = columns.get(place.removeprefix("json:"))
    if value is None:
        raise RecordRejected("caption_missing", where + sample.files)
    if isinstance(value, list) and not recipe.lists:
        raise RecordRejected("caption_not_text", f"{place} is a list; captions_most=N stores N captions of it")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise RecordRejected("caption_list_empty", f"{place} is a list without captions")
    if any(isinstance(one, list) for one in values):
        raise RecordRejected("caption_list_nested", f"{place} is a list of lists")
    if not all(isinstance(one, str) for one in values):
        raise RecordRejected("caption_not_text", where.removesuffix(": "))
    return [one.encode("utf-8", "surrogatepass") for one in values]


def only_caption(sample: Sample, place: str, most_bytes: int) -> str:
    """The caption of a sample where one alone is read. place: "txt" or "json:KEY". Raises RecordRejected."""
    columns = {} if place == "txt" else metadata(sample)
    if isinstance(columns.get(place.removeprefix("json:")), list):
        raise RecordRejected("caption_not_text", f"{place} is a list")
    return cleaned(values_at(place, sample, columns, OF_ONE_CAPTION)[0], most_bytes)


def shared_out(counts: Sequence[int], most: int) -> list[int]:
    """How many captions of each place are taken, of `counts` that there are, `most` in all: the first of each, then
    the second of each, and so on."""
    taken = [0] * len(counts)
    for turn in range(max(counts, default=0)):
        for key, count in enumerate(counts):
            if sum(taken) == most:
                return taken
            taken[key] += turn < count
    return taken


def cleaned(data: bytes, most_bytes: int) -> str:
    """A caption without what shows nothing at its ends. Raises RecordRejected."""
    if len(data) > most_bytes:
        raise RecordRejected("caption_too_long", f"{len(data)} bytes, limits.caption_bytes={most_bytes}")
    try:
        text = data.decode("utf-8").replace("\0", "").strip().removeprefix(BYTE_ORDER_MARK).strip()
    except UnicodeDecodeError:
        raise RecordRejected("caption_bad_utf8") from None
    if not any(map(_is_visible, text)):
        raise RecordRejected("caption_empty")
    return text


def _is_visible(character: str) -> bool:
    """Whether a character shows something by itself."""
    blank = character.isspace() or character in BLANK
    return not blank and unicodedata.category(character) not in INVISIBLE


def metadata(sample: Sample) -> dict[str, Any]:
    """The json object of a sample, {} when it has none. Raises RecordRejected: json_unreadable."""
    return read_columns(sample.members["json"]) if "json" in sample.members else {}
