"""The check of `latentmill index`: which of its keys go together, in place and into a new cache."""

from __future__ import annotations

import re

from pipeline.config.adoption import IndexConfig
from pipeline.config.values.bounds import require
from pipeline.config.values.members import parse_place
from pipeline.errors import ConfigError

ARRAYS = ("moments_member", "logvar_member", "text_member", "class_member", "boxes_member")


def check_index(config: IndexConfig) -> None:
    """latentmill index."""
    require(
        config.dataset.strip() + config.dest.strip() != "",
        "dataset is missing: give dataset=... (the folder or URL below which the tars lie), or dest=CACHE, which "
        "converts them",
    )
    require(
        not (config.dataset and config.dest),
        f"dataset={config.dataset} and dest={config.dest}: dataset= makes a dataset of tars where they lie, dest= "
        "converts them into a new cache; give one",
    )
    names = {name: getattr(config, name) for name in ARRAYS}
    given = {name: value for name, value in names.items() if value or name == "moments_member"}
    if config.text_storage == "tokens":
        given.pop("text_member", None)
    for name, value in given.items():
        check_converted(name, value) if config.dest else check_in_place(name, value)
        first = next(other for other in given if given[other] == value)
        require(first == name, f"{name}={value} is {first}")
    for name, count in {"class_member": "classes", "boxes_member": "box_classes"}.items():
        require(
            bool(names[name]) == bool(getattr(config, count)),
            f"{name}={names[name]} and {count}={getattr(config, count)}: give both, or neither",
        )
    check_kinds(config)
    if config.text_member or config.text_storage == "tokens":
        check_caption_key(config.caption_key, anywhere=bool(config.dest))


def check_in_place(name: str, value: str) -> None:
    """The name of a file that is read where it lies."""
    require(
        re.fullmatch(r"([^/:]*\.)?npy", value) is not None,
        f"{name}={value}: a .npy file is wanted, as named after the key (moments.npy); pickles are never opened, and "
        ".npz, .safetensors, bfloat16 and MDS are converted into a new cache, with dest= in place of dataset=",
    )


def check_converted(name: str, value: str) -> None:
    """The place of an array that is converted."""
    try:
        parse_place(value)
    except ConfigError as error:
        raise ConfigError(f"{name}={value}: {error}") from None


def check_kinds(config: IndexConfig) -> None:
    """What conversion alone does, and what contradicts what is stored."""
    for key, is_given in {
        "logvar_member": bool(config.logvar_member),
        "scaled": config.scaled,
        "text_storage": config.text_storage == "tokens",
    }.items():
        value = str(getattr(config, key)).lower()
        require(
            not is_given or bool(config.dest),
            f"{key}={value}: tars that stay where they lie are read as they are; give dest=CACHE, which converts them, "
            "in place of dataset=",
        )
    require(
        not (config.logvar_member and config.stored == "latents"),
        f"logvar_member={config.logvar_member} with stored=latents: latents have no log-variance; leave one out",
    )
    require(
        not (config.scaled and config.stored == "moments"),
        "scaled=true with stored=moments: of moments it is not known whether their log-variance is scaled, too; give "
        "scale=1 shift=0 in its place, or stored=latents for latents alone",
    )
    require(
        config.text_storage == "full" or config.encoders is not None,
        "text_storage=tokens: the text tower that makes token ids is that of encoders=; give it (encoders=sd1)",
    )


def check_caption_key(value: str, *, anywhere: bool) -> None:
    """Where captions are. anywhere: whether files and columns of any name are read."""
    if anywhere:
        file, colon, key = value.partition(":")
        require(
            bool(file) and "/" not in file and (not colon or bool(key)),
            f"caption_key={value}: a file or column is wanted, such as txt, caption or json:KEY",
        )
        return
    require(
        value == "txt" or (value.startswith("json:") and len(value) > 5),
        f"caption_key={value}: txt, or json:KEY for a key of the .json member",
    )
