"""COCO's json files: instances and stuff (boxes), captions; Lin et al. 2014, https://cocodataset.org/#format-data.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"} or {"image_id", "caption"}]}

A bbox is in pixels. Files of the same images are joined by their numbers. Whatever else an object holds is passed over.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.config import ConvertConfig
from pipeline.errors import SourceError
from preprocess.converting.boxes import BoxColumns, Boxes, four_numbers, to_fractions
from preprocess.converting.categories import GONE, Categories, categories_of, in_files, names_file, settled
from preprocess.converting.gathered import Gathered, is_foreign, usable
from preprocess.converting.json_lists import JsonLists
from preprocess.converting.rejects import Rejects
from preprocess.converting.streams import Annotations, Input, opened
from preprocess.converting.trees import add_maps, name_categories

LISTS = ("images", "annotations", "categories")
LARGEST_SIDE = 1 << 24
"""Pixels."""


def gather(config: ConvertConfig, listing: Mapping[str, int], maps: Mapping[str, int] | None = None) -> Gathered:
    """What files of annotations say. listing, maps: bytes of what lies in the folders of the images and of label maps.
    Raises SourceError and ConfigError."""
    coco = Coco(config)
    for file in opened(config.annotations):
        coco.read(file)
    result = coco.gathered(listing)
    if maps is not None:
        add_maps(result, config, maps, same=maps is listing)
        if coco.categories:
            name_categories(result, coco.categories)
    return result


class Coco:
    """Files of annotations, joined."""

    def __init__(self, config: ConvertConfig) -> None:
        self._config = config
        self._images: dict[int, tuple[str, int, int]] = {}
        self.categories: dict[int, str] = {}
        self._boxes, self._captions, self._said = BoxColumns(), dict[int, list[str]](), False
        self._bad_images, self._bad_annotations, self._count = Rejects(), Rejects(), 0
        self._inputs: list[Input] = []

    def read(self, file: Annotations) -> None:
        """Reads one file. Raises SourceError for what is no file of this format, or contradicts another one."""
        with file.text() as text:
            lists = JsonLists(text, LISTS)
            for name, entry in lists.items():
                if name == "images":
                    self._image(entry, file.where)
                elif name == "categories":
                    self._category(entry, file.where)
                else:
                    self._annotation(entry, file.where)
        missing = {"images", "annotations"} - lists.seen
        if missing:
            raise SourceError(
                f"{file.where}: it has no list of {' and of '.join(sorted(missing))}, so it is none of COCO's files of "
                "instances, stuff or captions"
            )
        self._inputs.append(file.input)

    def gathered(self, listing: Mapping[str, int]) -> Gathered:
        """What was read, of the images that are there."""
        by_file: dict[str, int] = {}
        for number, (name, *_) in self._images.items():
            if by_file.setdefault(name, number) != number:
                self._bad_images.add(name, "image_repeated", f"numbers {by_file[name]} and {number} are this file")
        files = usable(by_file, listing, self._bad_images)
        own = [by_file[file] for file in files]
        ids = np.array(sorted(self._images), dtype=np.int64)
        numbers = np.full(len(ids), GONE, dtype=np.int64)
        if own:
            numbers[np.searchsorted(ids, own)] = np.arange(len(own))
        sizes = np.array([self._images[number][1:] for number in own], dtype=np.int64).reshape(-1, 2)
        result = Gathered(files, sizes, images=self._bad_images, annotations=self._bad_annotations)
        if self.categories or len(self._boxes):
            categories = categories_of(self.categories, self._config, "the annotations")
            result.boxes = self._settled(categories, files, sizes, ids, numbers)
            result.names["boxes"] = names_file(categories.names, "boxes") if categories.names else b""
        if self._said:
            place = dict(zip(own, range(len(own)), strict=True))
            result.captions = {place[number]: told for number, told in self._captions.items() if number in place}
            for number in sorted(self._captions.keys() - self._images.keys()):
                for _ in self._captions[number]:
                    self._bad_annotations.add(str(number), "image_unknown", "a caption of no image that is listed")
        result.read, result.inputs = self._count, self._inputs
        listed = by_file.keys()
        result.passed_over = sum(file not in listed and not is_foreign(file) for file in listing)
        return result

    def _settled(
        self, categories: Categories, files: list[str], sizes: np.ndarray, ids: np.ndarray, numbers: np.ndarray
    ) -> Boxes:
        images = in_files(self._boxes.column("image"), ids, numbers)
        for row in np.flatnonzero(images == -1).tolist():
            number = self._boxes.image[row]
            self._bad_annotations.add(str(number), "image_unknown", "a box of no image that is listed")
        to_fractions(self._boxes.edges_N4, images, sizes)
        slack = 1 / np.maximum(sizes, 1)  # a pixel
        return settled(self._boxes, images, categories, files, slack, self._bad_annotations)

    # One entry -------------------------------------------------------------------------------------------------------

    def _image(self, entry: Any, where: str) -> None:
        found = _fields(entry)
        number, name, size = found["id"], found["file_name"], (found["width"], found["height"])
        if not (_is_number(number) and _is_text(name) and all(_is_side(side) for side in size)):
            self._bad_images.add(str(name or number), "entry_unreadable", "it lacks an id, file_name, width or height")
            return
        known = self._images.setdefault(number, (name, *size))
        if known != (name, *size):
            raise SourceError(
                f"{where}: image {number} is {name} of {size[0]} x {size[1]} pixels, and {known[0]} of {known[1]} x "
                f"{known[2]} before: convert files of other images to another dest"
            )

    def _category(self, entry: Any, where: str) -> None:
        found = _fields(entry)
        number, name = found["id"], found["name"]
        if not _is_number(number) or not _is_text(name):
            raise SourceError(f"{where}: a category lacks its id or name ({str(entry)[:80]}): mend the file")
        if self.categories.setdefault(number, name) != name:
            raise SourceError(
                f"{where}: category {number} is {name}, and {self.categories[number]} before: convert files of other "
                "categories to another dest"
            )

    def _annotation(self, entry: Any, where: str) -> None:
        self._count += 1
        found = _fields(entry)
        number, crowd = found["image_id"], found.get("iscrowd", 0)
        if "segments_info" in found:
            raise SourceError(
                f"{where}: these are panoptic annotations, which are not read: give the files of instances and stuff"
            )
        if not _is_number(number):
            self._bad_annotations.add(str(number), "annotation_unreadable", "it has no image_id")
        elif "caption" in found and "bbox" not in found:
            self._caption(number, found["caption"])
        elif not _is_number(found["category_id"]) or type(crowd) not in (int, bool) or crowd not in (0, 1):
            self._bad_annotations.add(
                f"image {number}", "annotation_unreadable", "no caption, and no category or crowd"
            )
        elif not four_numbers(found["bbox"]):
            self._bad_annotations.add(f"image {number}", "box_unreadable", "its bbox is no list of four numbers")
        else:
            self._boxes.add(number, found["category_id"], bool(crowd), found["bbox"])

    def _caption(self, number: int, text: Any) -> None:
        self._said = True
        reason = ""
        if not isinstance(text, str):
            reason = "caption_not_text"
        elif not _is_text(text := text.strip()):
            reason = "caption_bad_utf8" if text else "caption_empty"
        elif len(text.encode()) > self._config.limits.caption_bytes:
            reason = "caption_too_long"
        if reason:
            self._bad_annotations.add(f"image {number}", reason)
        else:
            self._captions.setdefault(number, []).append(text)


def _fields(entry: Any) -> collections.defaultdict[str, Any]:
    """The fields of an entry: None for those that it lacks."""
    return collections.defaultdict(lambda: None, entry if isinstance(entry, dict) else {})


def _is_number(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def _is_text(value: Any) -> bool:
    """Whether a value is text that is not empty and can be stored as UTF-8."""
    try:
        return isinstance(value, str) and value != "" and bool(value.encode())
    except UnicodeEncodeError:
        return False
