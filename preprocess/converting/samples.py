"""The files of one sample: its image as it is, and what is known of it as encode reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import ConvertConfig
from pipeline.errors import NotFound, RecordRejected
from pipeline.storage.base import Storage
from preprocess.converting.gathered import Gathered
from preprocess.converting.label_maps import checked_map, open_map
from preprocess.source.image import ORIENTATION, TURNS, open_image
from preprocess.source.sample import FILTERED
from preprocess.source.shard import split_name


@dataclass(frozen=True)
class Sample:
    """members: (name, content) of its files, sorted by name. boxes, captions: how many it has. largest: its largest
    label, -1 without a label map."""

    members: list[tuple[str, bytes]]
    boxes: int
    captions: int
    largest: int


class Folder:
    """A folder of which single files are read. sizes: bytes of each."""

    def __init__(self, storage: Storage, sizes: Mapping[str, int], most: int) -> None:
        self._storage, self._sizes, self._most = storage, sizes, most
        here = storage.local_path("x")
        self._root = here.parent.resolve() if here is not None else None

    def read(self, file: str, what: str) -> bytes:
        """The bytes of a file. what: image or labels, for reasons. Raises RecordRejected: WHAT_too_large for more bytes
        than limits.member_bytes, WHAT_outside for a link that leads out of the folder, WHAT_missing."""
        if self._sizes[file] > self._most:
            raise RecordRejected(f"{what}_too_large", f"{self._sizes[file]} bytes, limits.member_bytes={self._most}")
        path = self._storage.local_path(file)
        if path is not None and path.is_symlink() and not self._holds(path):
            raise RecordRejected(f"{what}_outside", "it is a link that leads out of the folder")
        try:
            data = self._storage.get(file)
        except NotFound:
            raise RecordRejected(f"{what}_missing", "it was there when the folder was listed") from None
        if len(data) > self._most:
            raise RecordRejected(f"{what}_too_large", f"{len(data)} bytes, limits.member_bytes={self._most}")
        return data

    def _holds(self, path: Path) -> bool:
        """Whether what a link leads to lies in the folder."""
        return self._root is not None and path.resolve().is_relative_to(self._root)


class Samples:
    """Samples by their numbers, as what was gathered says."""

    def __init__(self, config: ConvertConfig, gathered: Gathered, images: Folder, maps: Folder | None) -> None:
        self._config, self._gathered, self._images, self._maps = config, gathered, images, maps

    def file(self, number: int) -> str:
        """The path of its image."""
        return self._gathered.files[number]

    def sample(self, number: int) -> Sample:
        """Reads and joins the files of one sample. Raises RecordRejected."""
        gathered = self._gathered
        file = gathered.files[number]
        key = split_name(file)[0]
        boxes = gathered.boxes.of(number) if gathered.boxes is not None else []
        self._refuse_unwanted(len(boxes))
        place = gathered.maps[number] if gathered.maps is not None else ""
        if gathered.maps is not None and not place:
            raise RecordRejected("labels_missing", "its label map is not there")
        data = self._images.read(file, "image")
        opened = open_image(data, self._config.limits)
        members, largest = {file: data}, -1
        if gathered.boxes is not None:
            size = None if gathered.sizes is None else (int(gathered.sizes[number, 0]), int(gathered.sizes[number, 1]))
            refuse_other_view(opened, size, "image_size")
        if self._maps is not None:
            found = self._maps.read(place, "labels")
            opened_map = open_map(found, self._config.limits.pixels)
            refuse_other_view(opened, opened_map.size, "labels_size")
            checked, largest = checked_map(found, opened_map, gathered.values, self._config.label_offset)
            members[f"{key}.labels.png"] = checked
        captions = gathered.captions.get(number, []) if gathered.captions is not None else []
        columns: dict[str, Any] = {"boxes": boxes} if gathered.boxes is not None else {}
        columns |= {"captions": captions} if gathered.captions is not None else {}
        if columns:
            members[f"{key}.json"] = json.dumps(columns, ensure_ascii=False).encode()
        if captions:
            members[f"{key}.txt"] = captions[0].encode()
        if gathered.classes is not None:
            members[f"{key}.cls"] = str(int(gathered.classes[number])).encode()
        return Sample(sorted(members.items()), len(boxes), len(captions), largest)

    def _refuse_unwanted(self, boxes: int) -> None:
        """Raises RecordRejected for a number of boxes that the user does not want."""
        if boxes < self._config.min_boxes:
            raise RecordRejected(f"{FILTERED}min_boxes", f"it has {boxes}")
        if self._config.max_boxes and boxes > self._config.max_boxes:
            raise RecordRejected(f"{FILTERED}max_boxes", f"it has {boxes}")


def refuse_other_view(opened: Image.Image, size: tuple[int, int] | None, reason: str) -> None:
    """Raises RecordRejected where boxes or a label map may be of another view of the image than encode shows, which
    turns it as its EXIF says.

    size: (width, height) of the view that they are of; None where it is not known. reason: for another size.
    image_turned: EXIF turns the image, and the size does not tell whether the boxes were drawn before or after it.
    """
    try:
        orientation = opened.getexif().get(ORIENTATION, 1)
    except Exception:
        orientation = 1  # damaged EXIF is ignored, as encode does
    stored = (opened.width, opened.height)
    turned = orientation in TURNS
    upright = stored[::-1] if turned and orientation >= 5 else stored
    if size is not None and size not in (stored, upright):
        raise RecordRejected(reason, f"{upright[0]} x {upright[1]} pixels, annotated as {size[0]} x {size[1]}")
    if turned and (size is None or size == stored):
        raise RecordRejected("image_turned", "EXIF turns it, and its annotations may be of what is stored")
