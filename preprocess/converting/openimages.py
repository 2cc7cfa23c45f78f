"""OpenImages' csv files of boxes (Kuznetsova et al. 2020, https://storage.googleapis.com/openimages/web/download.html).

    ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside

Edges are fractions of the image. A LabelName (/m/011k07) is named by class-descriptions-boxable.csv; classes are
numbered in its order. An image is ImageID.jpg, in the folder of the images or in one below.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.config import ConvertConfig
from pipeline.errors import ParseError
from preprocess.converting.boxes import BoxColumns
from preprocess.converting.categories import GONE, categories_of, names_file, settled
from preprocess.converting.gathered import Gathered, is_foreign, is_image, usable
from preprocess.converting.names import descriptions
from preprocess.converting.rejects import Rejects
from preprocess.converting.streams import Annotations, Input, opened
from preprocess.source.shard import split_name

COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")
SLACK = 1e-3
"""How far outside of the image an edge may lie, as a fraction: what is nearer is clipped."""
GROUPS = {"1": True, "0": False, "-1": False}
"""Values of IsGroupOf; -1 is unknown."""


def gather(config: ConvertConfig, listing: Mapping[str, int]) -> Gathered:
    """What files of boxes say. listing: bytes of what lies in the folder of the images. Raises SourceError and
    ConfigError."""
    found, named = descriptions(config.names)
    rows = Rows({label: number for number, label in enumerate(found)})
    inputs = [named]
    for file in opened(config.annotations):
        inputs.append(rows.read(file))
    categories = categories_of(dict(enumerate(found.values())), config, config.names)
    images, by_id = Rejects(), _by_id(listing)
    wanted = dict[str, str]()
    for one in rows.ids:
        place = by_id.get(one, f"{one}.jpg")
        if place:
            wanted[place] = one
        else:
            images.add(one, "image_repeated", "several files below the folder of the images have this name")
    files = usable(wanted, listing, images)
    numbers = np.full(len(rows.ids), GONE, dtype=np.int64)
    if files:
        numbers[[rows.ids[wanted[file]] for file in files]] = np.arange(len(files))
    own = numbers[rows.columns.column("image")] if len(rows.columns) else np.zeros(0, dtype=np.int64)
    boxes = settled(rows.columns, own, categories, files, SLACK, rows.rejects)
    held = wanted.keys()
    return Gathered(
        files,
        boxes=boxes,
        names={"boxes": names_file(categories.names, "boxes")},
        images=images,
        annotations=rows.rejects,
        read=rows.count,
        inputs=inputs,
        passed_over=sum(file not in held and not is_foreign(file) for file in listing),
    )


def _by_id(listing: Mapping[str, int]) -> dict[str, str]:
    """The file of each ImageID; "" where several have the name."""
    places: dict[str, str] = {}
    for file in listing:
        if is_image(file) and not is_foreign(file):
            name = (split_name(file)[0] or file).rpartition("/")[2]
            places[name] = "" if name in places else file
    return places


class Rows:
    """The rows of all files. ids: ImageIDs by the number under which `columns` have them. labels: the number of each
    LabelName."""

    def __init__(self, labels: Mapping[str, int]) -> None:
        self.ids: dict[str, int] = {}
        self.columns, self.rejects, self.count = BoxColumns(), Rejects(), 0
        self._labels = labels

    def read(self, file: Annotations) -> Input:
        """Reads a file. Returns what it was. Raises SourceError for what is no such csv."""
        with file.text() as text:
            rows = csv.reader(text, strict=True)
            try:
                header = next(rows, [])
                lacks = [name for name in COLUMNS[:-1] if name not in header]
                if lacks:
                    raise ParseError(f"its first line names no column {', '.join(lacks)}, so it is no file of boxes")
                group = header.index(COLUMNS[-1]) if COLUMNS[-1] in header else None
                places = [header.index(name) for name in COLUMNS[:-1]]
                for row in rows:
                    if row:
                        self._row(row, len(header), places, group)
            except csv.Error as error:
                raise ParseError(f"line {rows.line_num} is no csv ({error})") from None
        return file.input

    def _row(self, row: Sequence[str], width: int, places: Sequence[int], group: int | None) -> None:
        """Keeps the box of a row, or counts why not."""
        self.count += 1
        reason, what = "", ""
        if len(row) != width:
            self.rejects.add(row[0], "row_unreadable", f"it has {len(row)} fields, the first line has {width}")
            return
        one, label, *numbers = (row[place] for place in places)
        kind = GROUPS.get(row[group]) if group is not None else False
        edges = numbers_of(numbers)
        if not one or "/" in one or kind is None:
            reason, what = "row_unreadable", "no ImageID, or an IsGroupOf that is none of 1, 0, -1"
        elif label not in self._labels:
            reason, what = "category_unknown", f"{label} has no name"
        elif edges is None:
            reason, what = "box_unreadable", f"an edge is no number: {', '.join(numbers)}"
        if reason != "row_unreadable":
            self.ids.setdefault(one, len(self.ids))
        if reason or edges is None or kind is None:
            self.rejects.add(one, reason, what)
        else:
            self.columns.add(self.ids[one], self._labels[label], kind, edges)


def numbers_of(texts: Sequence[str]) -> list[float] | None:
    """The numbers that texts are; None where one is none."""
    try:
        return None if any("_" in text for text in texts) else [float(text) for text in texts]
    except ValueError:
        return None
