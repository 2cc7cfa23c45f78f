"""The facts of the conditions that `encode` is asked to make, from its configuration and the files of names."""

from __future__ import annotations

import os
from typing import Any

from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.conditions.names import read_names
from pipeline.config import EncodeConfig
from pipeline.config.conditions import MaskConfig
from pipeline.config.values.bounds import require
from pipeline.data.format.contract import canonical_json
from pipeline.errors import ConfigError, NotFound
from pipeline.storage.urls import open_storage, split_url
from preprocess.gathering.folder import class_folders

CONVENTIONS: dict[str, dict[str, Any]] = {
    "own": {"hole": "grey", "pooling": "max", "order": "mask_masked", "low": 0},
    "stable_diffusion": {"hole": "grey", "pooling": "nearest", "order": "mask_masked", "low": 0},
    "ldm": {"hole": "black", "pooling": "nearest", "order": "masked_mask", "low": -1},
}
"""What each convention of inpainting gives a model: facts of MaskFacts."""


def conditions_of(config: EncodeConfig) -> Conditions:
    """The facts of the conditions that a configuration asks for. Reads the files of names. Raises ConfigError."""
    asked, count = config.conditions, counted
    classes, boxes, labels, lowres = config.classes, config.boxes, config.labels, config.lowres
    return Conditions(
        classes=ClassFacts(key=classes.key, **class_names(config)) if "class" in asked else None,
        boxes=BoxFacts(most=boxes.most, min_area=boxes.min_area, **count("boxes", boxes)) if "boxes" in asked else None,
        labels=(
            LabelFacts(grid=labels.grid, offset=labels.offset, **count("labels", labels)) if "labels" in asked else None
        ),
        lowres=(
            LowresFacts(factor=lowres.factor, degradation=lowres.degradation, variants=lowres.variants)
            if "lowres" in asked
            else None
        ),
        mask=mask_facts(config.mask) if "mask" in asked else None,
        pixels="pixels" in asked,
    )


def mask_facts(config: MaskConfig) -> MaskFacts:
    """The facts of masks."""
    return MaskFacts(kinds=config.kinds, variants=config.variants, **CONVENTIONS[config.convention])


def class_names(config: EncodeConfig) -> dict[str, Any]:
    """`count` and `names` of the classes, with classes.key=folder those of the folders in the source. Raises
    ConfigError and SourceError."""
    if config.classes.key != "folder" or config.classes.names:
        return counted("classes", config.classes)
    require(
        config.classes.count == 0,
        f"classes.count={config.classes.count} with classes.key=folder: the folders say how many there are, so leave "
        "it out",
    )
    storage = open_storage(config.source.rstrip("/") or "/")
    is_pattern = any(character in config.source for character in "*?[{")
    if is_pattern or (storage.local_path("x") is not None and not os.path.isdir(storage.url)):
        raise ConfigError(
            f"classes.key=folder with source={config.source}: give the folder that holds a folder for each class, or "
            "the names of the classes in order, as classes.names=FILE"
        )
    names = read_names(canonical_json(class_folders(storage.url, storage)), f"the folders of {storage.url}")
    return {"count": len(names), "names": names}


def counted(group: str, config: Any) -> dict[str, Any]:
    """`count` and `names` of a group of keys. Raises ConfigError when both are given and they differ."""
    names = names_of(f"{group}.names", config.names) if config.names else ()
    if names and config.count not in (0, len(names)):
        raise ConfigError(
            f"{group}.count={config.count}, but {config.names} has {len(names)} names: leave {group}.count out, or "
            "name them all"
        )
    return {"count": config.count or len(names), "names": names}


def names_of(key: str, place: str) -> tuple[str, ...]:
    """The names in a file (path or URL). key: of the configuration, for messages. Raises ConfigError."""
    folder, name = split_url(place)
    try:
        data = open_storage(folder).get(name)
    except NotFound:
        raise ConfigError(f"{key}={place}: there is no such file") from None
    try:
        return read_names(data, place)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
