"""The contract of a cache: everything besides the source that its bytes depend on."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from pipeline.conditions.facts import Conditions
from pipeline.config import EncodeConfig, EncodersConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, stored_filters, stored_limits
from pipeline.data.format.contract_json import require_readable
from pipeline.data.format.members import arrays_of
from pipeline.data.format.pixels import png_library
from pipeline.errors import ConfigError
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.storage.urls import without_folders
from preprocess.colour import profiles
from preprocess.filters import phash
from preprocess.source.image import RESIZE
from preprocess.source.recipe import NEW_COLOUR, Target

PACKAGES = ("diffusers", "numpy", "open_clip_torch", "pillow", "torch")
UNKNOWN = (Member(name="moments", shape=(), dtype="float16"),)
"""Stands for the arrays until the facts that they follow from are together."""


def build_contract(
    config: EncodeConfig,
    target: Target,
    conditions: Conditions,
    stage: FirstStage,
    text: TextTower | None,
    device: torch.device,
) -> Contract:
    """Builds the contract of one dataset. text: None where no captions are stored. Raises ConfigError when a size is
    not a multiple of the autoencoder's factor, or of the low resolution's."""
    factor, places = stage.downsampling, config.caption_places if text else ()
    if target.resolution % factor:
        raise ConfigError(f"resolution={target.resolution} is not a multiple of the autoencoder's {factor}")
    if any(side % factor for size in target.sizes for side in size):
        raise ConfigError(f"buckets={config.buckets} is not a multiple of the autoencoder's {factor}")
    lowres = conditions.lowres
    if lowres is not None and any(side % lowres.factor for size in target.sizes for side in size):
        sides = f"resolution={target.resolution}" if len(target.sizes) == 1 else f"buckets={config.buckets}"
        raise ConfigError(f"lowres.factor={lowres.factor}: {sides} is not a multiple of it")
    contract = Contract(
        encoders=portable(config.used_encoders),
        vae_sha256=stage.weights_sha256,
        text_sha256=text.weights_sha256 if text else "",
        resolution=target.resolution,
        buckets=target.sizes,
        crop=config.crop,
        seed=config.seed,
        flip=config.flip,
        filters=stored_filters(config.filters),
        limits=stored_limits(config.limits),
        resize=RESIZE,
        latent_shape=(stage.latent_channels, target.resolution // factor, target.resolution // factor),
        downsampling=factor,
        scale=stage.scale,
        shift=stage.shift,
        stored=stage.stored,
        pixels=config.pixels if stage.stored == "pixels" else "array",
        caption_key=places[0] if places else "",
        text=of_captions(text, config) if text and places else None,
        conditions=conditions,
        colour=config.colour or NEW_COLOUR,
        clip_sha256=text.image_sha256 if text and config.filters.clip_score else "",
        members=UNKNOWN,
        batch=config.batch,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        versions={name: version(name) for name in PACKAGES} | libraries(config),
    )
    contract = replace(contract, members=arrays_of(contract))
    require_readable(contract)
    return contract


def libraries(config: EncodeConfig) -> dict[str, str]:
    """What the bytes depend on besides the packages, where it is used. Raises ConfigError for a Pillow that cannot
    convert colours."""
    found = {}
    if config.pixels == "png":
        found["png"] = png_library()
    if (config.colour or NEW_COLOUR) == "srgb":
        found["littlecms"] = profiles.library()
        if not found["littlecms"]:
            raise ConfigError(
                "colour=srgb: this Pillow is built without LittleCMS: install the one of PyPI, or give colour=as_stored"
            )
    if config.filters.near_duplicates:
        found["perceptual_hash"] = phash.NAME
    return found


def of_captions(text: TextTower, config: EncodeConfig) -> TextFacts:
    """The facts of the captions that a configuration asks for."""
    storage = config.text_kind
    assert storage != "none", "a text tower is loaded for captions"
    return text_facts(text, storage, config.captions, config.caption_places, config.caption_weights)


def text_facts(
    text: TextTower,
    storage: Literal["full", "trimmed", "tokens"],
    captions: int = 1,
    keys: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
) -> TextFacts:
    """The facts of what is stored of captions. Of token ids it is said which there are, for a network that is trained
    on them. captions: that a record holds, at most; keys, weights: of several, as in TextFacts."""
    facts = TextFacts(
        storage=storage,
        layer=text.layer,
        length=text.length,
        width=text.width,
        pad=text.pad,
        eot=text.eot,
        quick_gelu=text.quick_gelu,
        captions=captions,
        keys=keys if captions > 1 else (),
        weights=weights if captions > 1 else (),
    )
    return replace(facts, vocabulary=text.vocabulary, start=text.start) if storage == "tokens" else facts


def portable(encoders: EncodersConfig) -> dict[str, Any]:
    """The encoders' configuration without paths of this machine: of an absolute path only the last part is kept."""
    fields = asdict(encoders)
    for name in ("vae", "text", "text_pretrained"):
        fields[name] = without_folders(fields[name])
    del fields["weights"]  # the hashes identify the weights, wherever they are stored
    return fields
