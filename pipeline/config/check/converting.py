"""What goes together in the configuration of `latentmill convert`: each format takes its own keys."""

from __future__ import annotations

import dataclasses

from pipeline.config.converting import ConvertConfig
from pipeline.config.values.bounds import require
from pipeline.config.values.keys import key_of

OF_BOXES = ("crowds", "leave_out", "min_boxes", "max_boxes")
OF_MAPS = ("image_end", "label_end", "label_offset")
TAKES = {
    "coco": ("annotations", "labels", *OF_BOXES, *OF_MAPS),
    "openimages": ("annotations", "names", *OF_BOXES),
    "labels": ("labels", "names", *OF_MAPS),
    "classes": ("names",),
}
"""Keys that a format takes, besides those that all take."""
NEEDS = {
    "coco": {"annotations": "annotations=[annotations/instances_train2017.json]"},
    "openimages": {
        "annotations": "annotations=[oidv6-train-annotations-bbox.csv]",
        "names": "names=class-descriptions-boxable.csv",
    },
    "labels": {"labels": "labels=FOLDER, the images' own where they lie side by side"},
    "classes": {},
}
"""Keys that a format cannot do without, and an example of each."""
OF_SOME = {key for keys in TAKES.values() for key in keys}


def check_convert(config: ConvertConfig) -> None:
    """latentmill convert."""
    kind = config.from_
    for key, example in NEEDS[kind].items():
        require(bool(getattr(config, key)), f"{key} is missing: from={kind} needs {example}")
    for field in dataclasses.fields(config):
        key, value = key_of(field.name), getattr(config, field.name)
        if field.name not in OF_SOME or value == field.default:
            continue
        others = ", ".join(name for name, keys in TAKES.items() if field.name in keys)
        require(field.name in TAKES[kind], f"{key} is given, but from={kind} has no use for it (from={others} has)")
        require(
            field.name not in OF_MAPS or config.labels != "",
            f"{key}={value} is for label maps: give labels=FOLDER, or leave {key} out",
        )
    require(
        kind != "labels" or config.names != "" or config.label_offset == 0,
        f"label_offset={config.label_offset} without names: maps are copied as they are; give names=, or "
        "labels.offset= to encode",
    )
    require(all(map(str.strip, config.annotations)), "annotations: the name of a file is empty")
    require(
        config.max_boxes == 0 or config.min_boxes <= config.max_boxes,
        f"min_boxes={config.min_boxes} and max_boxes={config.max_boxes}: no image has so many and so few",
    )
    for key in ("image_end", "label_end"):
        require("/" not in getattr(config, key), f"{key}={getattr(config, key)}: the end of a name has no slash")
