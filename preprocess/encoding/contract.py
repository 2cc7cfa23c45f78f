"""The contract of a cache: everything besides the source that its bytes depend on."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from pipeline.conditions.facts import Conditions
from pipeline.config import EncodeConfig, EncodersConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, plain, stored_limits
from pipeline.data.format.contract_json import require_readable
from pipeline.data.format.members import arrays_of
from pipeline.data.format.pixels import png_library
from pipeline.errors import ConfigError
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.storage.urls import without_folders
from preprocess.source.image import RESIZE
from preprocess.source.recipe import Target

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
        filters=plain(config.filters),
        limits=stored_limits(config.limits),
        resize=RESIZE,
        latent_shape=(stage.latent_channels, target.resolution // factor, target.resolution // factor),
        downsampling=factor,
        scale=stage.scale,
        shift=stage.shift,
        stored=stage.stored,
        pixels=config.pixels if stage.stored == "pixels" else "array",
        caption_key=places[0] if places else "",
        text=text_facts(text, config) if text and places else None,
        conditions=conditions,
        members=UNKNOWN,
        batch=config.batch,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        versions={name: version(name) for name in PACKAGES}
        | ({"png": png_library()} if config.pixels == "png" else {}),
    )
    contract = replace(contract, members=arrays_of(contract))
    require_readable(contract)
    return contract


def text_facts(text: TextTower, config: EncodeConfig) -> TextFacts:
    """The facts of what is stored of captions. Of token ids it is said which there are, for a network that is trained
    on them."""
    storage, several = config.text_kind, config.captions > 1
    assert storage != "none", "a text tower is loaded for captions"
    facts = TextFacts(
        storage=storage,
        layer=text.layer,
        length=text.length,
        width=text.width,
        pad=text.pad,
        eot=text.eot,
        quick_gelu=text.quick_gelu,
        captions=config.captions,
        keys=config.caption_places if several else (),
        weights=config.caption_weights if several else (),
    )
    return replace(facts, vocabulary=text.vocabulary, start=text.start) if storage == "tokens" else facts


def portable(encoders: EncodersConfig) -> dict[str, Any]:
    """The encoders' configuration without paths of this machine: of an absolute path only the last part is kept."""
    fields = asdict(encoders)
    for name in ("vae", "text", "text_pretrained"):
        fields[name] = without_folders(fields[name])
    del fields["weights"]  # the hashes identify the weights, wherever they are stored
    return fields
