"""The contract of a cache: everything besides the source that its bytes depend on."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from pipeline.config import EncodeConfig, EncodersConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, canonical_json, plain, stored_limits
from pipeline.data.format.contract_json import require_readable
from pipeline.data.format.members import LOWRES_FACTOR
from pipeline.errors import ConfigError
from pipeline.models.encoders.autoencoder import FirstStage
from pipeline.models.encoders.text import TextTower
from pipeline.storage.urls import without_folders
from preprocess.source.image import RESIZE
from preprocess.source.recipe import Target
from preprocess.source.sample import MOST_BOXES

PACKAGES = ("diffusers", "numpy", "open_clip_torch", "pillow", "torch")
VARIES = -1  # stands for a side that differs between records


def build_contract(
    config: EncodeConfig, target: Target, stage: FirstStage, text: TextTower, device: torch.device
) -> Contract:
    """Builds the contract of one dataset. Raises ConfigError when a size is not a multiple of the autoencoder's
    factor."""
    factor = stage.downsampling
    if target.resolution % factor:
        raise ConfigError(f"resolution={target.resolution} is not a multiple of the autoencoder's {factor}")
    if any(side % factor for size in target.sizes for side in size):
        raise ConfigError(f"buckets={config.buckets} is not a multiple of the autoencoder's {factor}")
    contract = Contract(
        encoders=portable(config.encoders),
        vae_sha256=stage.weights_sha256,
        text_sha256=text.weights_sha256,
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
        caption_key=config.caption_key,
        text=TextFacts(
            storage=config.text_storage,
            layer=text.layer,
            length=text.length,
            width=text.width,
            pad=text.pad,
            eot=text.eot,
            quick_gelu=text.quick_gelu,
        ),
        members=members(config, target, stage, text),
        batch=config.batch,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        versions={name: version(name) for name in PACKAGES},
    )
    require_readable(contract)
    return contract


def members(config: EncodeConfig, target: Target, stage: FirstStage, text: TextTower) -> tuple[Member, ...]:
    """The arrays that every record holds."""
    channels = stage.latent_channels
    width, height = target.sizes[0] if len(target.sizes) == 1 else (VARIES, VARIES)

    def sides(factor: int = 1) -> tuple[int, int]:
        return (height, width) if width == VARIES else (height // factor, width // factor)

    states = {
        "full": Member(name="text", shape=(text.length, text.width), dtype="float16"),
        "trimmed": Member(name="text", shape=(VARIES, text.width), dtype="float16"),
        "tokens": Member(name="tokens", shape=(text.length,), dtype="int32"),
    }
    conditions = {
        "boxes": (Member(name="cond.boxes", shape=(MOST_BOXES, 5), dtype="float16"),),
        "labels": (Member(name="cond.labels", shape=sides(), dtype="uint8"),),
        "lowres": (Member(name="cond.lowres", shape=(3, *sides(LOWRES_FACTOR)), dtype="uint8"),),
        "mask": (
            Member(name="cond.mask", shape=sides(), dtype="uint8"),
            Member(name="cond.masked", shape=(channels, *sides(stage.downsampling)), dtype="float16"),
        ),
    }
    return (
        Member(name="moments", shape=(2 * channels, *sides(stage.downsampling)), dtype="float16"),
        states[config.text_storage],
        *(member for name in sorted(config.conditions) for member in conditions[name]),
    )


def portable(encoders: EncodersConfig) -> dict[str, Any]:
    """The encoders' configuration without paths of this machine: of an absolute path only the last part is kept."""
    fields = asdict(encoders)
    for name in ("vae", "text", "text_pretrained"):
        fields[name] = without_folders(fields[name])
    del fields["weights"]  # the hashes identify the weights, wherever they are stored
    return fields


def contract_digest(contract: Contract) -> str:
    """SHA-256 that identifies a contract."""
    return hashlib.sha256(canonical_json(asdict(contract))).hexdigest()
