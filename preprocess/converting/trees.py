"""Folders as annotations: a folder of images for each class, and a folder of label maps named like their images."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np

from pipeline.conditions.facts import MOST_CLASSES
from pipeline.config import ConvertConfig
from pipeline.errors import ConfigError, SourceError
from preprocess.converting.categories import names_file
from preprocess.converting.gathered import Gathered, is_foreign, is_image, usable
from preprocess.converting.names import folders, values
from preprocess.converting.rejects import Rejects
from preprocess.source.shard import split_name

UNLABELLED = "unlabelled"
"""Name of the value 0 of maps whose values are categories' numbers, where no category has it."""


def gather_classes(config: ConvertConfig, listing: Mapping[str, int]) -> Gathered:
    """Images of classes: of FOLDER/a.jpg and FOLDER/b/c.jpg the class is FOLDER's.

    listing: bytes of what lies in the folder of the images. Reasons of rejection: class_missing for an image that lies
    in no folder; class_unknown for one whose folder the file of names does not name. Raises SourceError, ConfigError.
    """
    images = [file for file in listing if is_image(file) and not is_foreign(file)]
    rejects, found = Rejects(), collections.Counter(file.partition("/")[0] for file in images if "/" in file)
    if config.names:
        named, known = folders(config.names)
        inputs = [known]
    else:
        named, inputs = {folder: folder for folder in sorted(found)}, []
    if not named:
        raise SourceError(f"images={config.images}: it holds no folder with images, so there are no classes")
    if len(named) > MOST_CLASSES:
        raise ConfigError(f"images={config.images}: it has {len(named)} folders, {MOST_CLASSES} classes at most")
    if found and not found.keys() & named.keys():
        raise ConfigError(
            f"names={config.names}: it names none of the folders in {config.images}, such as {min(found)}; name "
            "the folders themselves"
        )
    numbers = {folder: number for number, folder in enumerate(named)}
    kept = list[str]()
    for file in sorted(images):
        folder, slash, _ = file.partition("/")
        if not slash:
            rejects.add(file, "class_missing", "it lies in no folder of a class")
        elif folder not in numbers:
            rejects.add(file, "class_unknown", f"the file of names does not name {folder}")
        else:
            kept.append(file)
    files = usable(kept, listing, rejects)
    classes = np.array([numbers[file.partition("/")[0]] for file in files], dtype=np.int64)
    return Gathered(
        files,
        classes=classes,
        names={"classes": names_file(list(named.values()), "classes")},
        images=rejects,
        inputs=inputs,
        passed_over=len(listing) - len(images),
    )


def gather_labels(config: ConvertConfig, listing: Mapping[str, int], maps: Mapping[str, int]) -> Gathered:
    """Images with label maps. listing, maps: bytes of what lies in the folders of the images and of the label maps; the
    same object where they are one folder. Raises SourceError and ConfigError."""
    images = [file for file in listing if is_image(file) and not is_foreign(file)]
    place, taken = {file: map_of(file, config) for file in images}, set[str]()
    if maps is listing:
        taken = {where for file, where in place.items() if where in maps and where != file}
    own = [file for file in images if place[file] and file not in taken]
    rejects = Rejects()
    result = Gathered(usable(own, listing, rejects), images=rejects)
    result.passed_over = len(listing) - len(own) - len(taken)
    add_maps(result, config, maps, same=maps is listing)
    if config.names:
        named, known = values(config.names)
        result.inputs.append(known)
        name_values(result, named)
    return result


def add_maps(result: Gathered, config: ConvertConfig, maps: Mapping[str, int], *, same: bool) -> None:
    """Gives each image the path of its label map, "" where there is none. same: maps and images lie in one folder.
    Raises SourceError where no image has one."""
    own = [(file, map_of(file, config)) for file in result.files]
    result.maps = [where if where in maps and not (same and where == file) else "" for file, where in own]
    if own and not any(result.maps):
        raise SourceError(
            f"labels={config.labels}: no image has a label map there: {own[0][0]} would have {own[0][1]}; look at "
            "image_end= and label_end="
        )


def map_of(file: str, config: ConvertConfig) -> str:
    """The path of an image's label map; "" for an image whose name does not end as images do."""
    key = split_name(file)[0] if split_name(file)[1] else file.rpartition(".")[0]
    if not key.endswith(config.image_end):
        return ""
    return f"{key.removesuffix(config.image_end)}{config.label_end}.png"


def name_values(result: Gathered, named: Mapping[int, str]) -> None:
    """Numbers the values of label maps anew, without holes, in their order. named: their names by value."""
    table = np.full(256, -1, dtype=np.int16)
    for number, value in enumerate(sorted(named)):
        table[value] = number
    result.values = table
    result.names["labels"] = names_file([named[value] for value in sorted(named)], "labels")


def name_categories(result: Gathered, named: Mapping[int, str]) -> None:
    """The same for maps whose values are the numbers of categories, and 0 where there is none. Raises ConfigError."""
    if named and not 0 <= min(named) <= max(named) < 256:
        raise ConfigError(
            f"labels: categories are numbered {min(named)} to {max(named)}, and label maps of 8 bits hold 0 to 255; "
            "leave labels out"
        )
    name_values(result, {0: UNLABELLED, **named})
