"""What a format says of its images, whatever the format is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from preprocess.converting.boxes import Boxes
from preprocess.converting.rejects import Rejects
from preprocess.converting.streams import Input
from preprocess.source.shard import FOREIGN_FOLDER, IMAGES, KEY_LENGTH, split_name


@dataclass
class Gathered:
    """Images in the order in which they are written, and what is known of each.

    files: paths relative to images=. sizes: (n, 2) int64 width and height in pixels as annotated, or None. boxes: by
    image, or None where there are none at all. captions: by number of image, in the order of the files; None where none
    are looked for. classes: (n,) int64, or None. maps: path relative to labels= of each image's label map, "" where it
    is missing; None without label maps. values: (256,) int16, the label of each value of a map, -1 where it has no
    name; None where maps are copied. names: files of names by what they name (boxes, classes, labels). images,
    annotations: rejects of images before any was read, and of annotations. read: number of annotations. inputs: files
    that were read. passed_over: files among the images that nothing is said of.
    """

    files: list[str]
    sizes: np.ndarray | None = None
    boxes: Boxes | None = None
    captions: dict[int, list[str]] | None = None
    classes: np.ndarray | None = None
    maps: list[str] | None = None
    values: np.ndarray | None = None
    names: dict[str, bytes] = field(default_factory=dict)
    images: Rejects = field(default_factory=Rejects)
    annotations: Rejects = field(default_factory=Rejects)
    read: int = 0
    inputs: list[Input] = field(default_factory=list)
    passed_over: int = 0

    @property
    def total(self) -> int:
        """Number of images that the source speaks of."""
        return len(self.files) + self.images.counts.total()


def usable(files: Iterable[str], listing: Mapping[str, int], rejects: Rejects) -> list[str]:
    """The files that can be samples, sorted; the others are counted.

    listing: bytes of what lies in the folder. Reasons: image_missing; image_format for a name that is none of a jpg,
    png or webp; name_unusable for one that would be read as something else in a tar; key_repeated for one that differs
    from another by its suffix alone.
    """
    kept, keys = list[str](), set[str]()
    for file in sorted(files):
        key, suffix = split_name(file)
        if file not in listing:
            rejects.add(file, "image_missing", "no such file lies in the folder of the images")
        elif suffix not in IMAGES and not file.lower().endswith(tuple(f".{one}" for one in IMAGES)):
            rejects.add(file, "image_format", f"its name ends in none of {', '.join(IMAGES)}")
        elif suffix not in IMAGES or len(key) > KEY_LENGTH or split_name(f"{key}.json") != (key, "json"):
            rejects.add(file, "name_unusable", "in a tar its name would mean something else; rename it")
        elif key in keys:
            rejects.add(file, "key_repeated", f"another image is called {key}, too")
        else:
            keys.add(key)
            kept.append(file)
    return kept


def is_foreign(path: str) -> bool:
    """Whether a path is hidden, or of what a Mac puts beside the files of a user."""
    return any(part.startswith(".") or part == FOREIGN_FOLDER for part in path.split("/"))


def is_image(path: str) -> bool:
    """Whether a path is named like an image."""
    return path.lower().endswith(tuple(f".{suffix}" for suffix in IMAGES))
