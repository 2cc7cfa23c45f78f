"""Where the encoders lie that a cache names.

A contract holds no folders of the machine that encoded: of an absolute path it keeps the last part, and a relative one
as it is. Such a name is looked for in the working directory and beside the caches at hand, before it may be one on the
Hugging Face hub. A name without an owner is never asked for there: it was a folder's. What is found proves itself by
the hash of its weights, as all encoders do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from pipeline.config import EncodersConfig
from pipeline.config.loading.folders import groups
from pipeline.config.loading.load import load
from pipeline.errors import WeightsError
from pipeline.models.encoders import autoencoder, tokenizer
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.parsing.text import one_line

OF_NO_PLACE = ("demo", autoencoder.PIXELS)
"""Names of autoencoders that are not looked for."""
OF_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A repository of the hub with its owner."""


def load_named(
    config: EncodersConfig, sha256: str, beside: Sequence[str], device: torch.device | str = "cpu"
) -> FirstStage:
    """The first stage that a cache's or a run's `config` names: of several places with that name, the one whose weights
    have the hash `sha256`, or else the last.

    beside: datasets, beside which it is looked for; URLs are passed over. Raises WeightsError, with the words that say
    where it lies, when there is none of that name.
    """
    if config.vae in OF_NO_PLACE or config.weights:
        return load_autoencoder(config, device)
    places = find(config.vae, os.path.join(config.vae_subfolder, autoencoder.CONFIG), beside)
    if not places and (config.seed >= 0 or OF_HUB.fullmatch(config.vae)):
        try:
            return load_autoencoder(config, device)
        except WeightsError as error:
            where = f"it is neither in the working directory nor beside the cache ({_looked(beside)})"
            raise WeightsError(f"{error}. If {config.vae} was a folder, {where}: add {words(config)}") from None
    if not places:
        name = one_line(config.vae)[:100]
        raise WeightsError(
            f"the cache was made with the autoencoder in a folder or file {name}, which is neither in the working "
            f"directory nor beside the cache ({_looked(beside)}): add {words(config)} (or, had it been a repository of "
            f"the Hugging Face hub without an owner, encoders.vae={name})"
        )
    for place in places[:-1]:
        try:
            stage = load_autoencoder(replace(config, vae=place), device)
        except WeightsError:
            continue
        if stage.weights_sha256 == sha256:
            return stage
    return load_autoencoder(replace(config, vae=places[-1]), device)


def named_text(config: EncodersConfig, beside: Sequence[str]) -> EncodersConfig:
    """The configuration with the places of the text tower and of its weights, where they are folders or files that are
    found; of others as it is."""
    if config.weights or config.text == "demo":
        return config
    towers, weights = find(config.text, tokenizer.CONFIG, beside), find(config.text_pretrained, "", beside)
    return replace(config, text=[*towers, config.text][0], text_pretrained=[*weights, config.text_pretrained][0])


def located(config: EncodersConfig, beside: Sequence[str]) -> EncodersConfig:
    """The configuration with the place of the autoencoder, where it is a folder or file that is found; of several
    places the last, whose weights may be others."""
    if config.vae in OF_NO_PLACE or config.weights:
        return config
    places = find(config.vae, os.path.join(config.vae_subfolder, autoencoder.CONFIG), beside)
    return replace(config, vae=[config.vae, *places][-1])


def find(name: str, mark: str, beside: Sequence[str]) -> list[str]:
    """The places of a file, or of a folder that holds the file `mark`: by its path, which may be one from the working
    directory, then by its last part there, and by both beside the datasets."""
    path = os.path.expanduser(name)
    last = os.path.basename(path.rstrip("/"))
    paths = [path, last, *(os.path.join(folder, part) for folder in _folders(beside) for part in (path, last))]
    places = {os.path.abspath(place): place for place in paths if place}
    isfile = os.path.isfile
    return [place for place in places.values() if isfile(place) or (mark and isfile(os.path.join(place, mark)))]


def words(config: EncodersConfig) -> str:
    """What to add to a command line to say where the autoencoder lies: encoders=NAME and what differs from it."""
    group = config.name if config.name in groups("verify")["encoders"] else ""
    base = load("verify", ["dataset=unused", f"encoders={group}"]).encoders if group else EncodersConfig()
    differing = {
        field.name: one_line(str(getattr(config, field.name)))[:100]
        for field in fields(config)
        if field.name not in ("vae", "weights", "name") and getattr(config, field.name) != getattr(base, field.name)
    }
    given = [f"encoders={group}"] if group else []
    return " ".join([*given, "encoders.vae=FOLDER", *(f"encoders.{key}={value}" for key, value in differing.items())])


def _folders(beside: Sequence[str]) -> list[str]:
    """The folders that hold the datasets of this machine."""
    local = [url for url in beside if url and "://" not in url]
    return list(dict.fromkeys(os.path.dirname(os.path.abspath(os.path.expanduser(url))) for url in local))


def _looked(beside: Sequence[str]) -> str:
    """Where it was looked for, in words."""
    return ", ".join(_folders(beside)) or "which is not on this machine"
