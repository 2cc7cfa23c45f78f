"""What a cache will be: its contract, and the plan that a destination is begun with, before anything is encoded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from pipeline.config import EncodeConfig, EncodersConfig
from pipeline.data.manifest import Contract, Member, TextFacts, canonical_json, contract_from_json
from pipeline.errors import ConfigError, DestinationExists, NotFound
from pipeline.models.autoencoder import FirstStage
from pipeline.models.text import TextTower
from pipeline.storage import Storage
from preprocess.image import RESIZE
from preprocess.sample import LOWRES_FACTOR, MOST_BOXES
from preprocess.unit import Unit

PLAN = "contract.json"
PACKAGES = ("diffusers", "numpy", "open_clip_torch", "pillow", "torch")


def build_contract(config: EncodeConfig, stage: FirstStage, text: TextTower, device: torch.device) -> Contract:
    """What the cache's bytes will depend on. Raises ConfigError when the resolution does not suit the autoencoder."""
    side, rest = divmod(config.resolution, stage.downsampling)
    if rest:
        raise ConfigError(f"resolution={config.resolution} is not a multiple of the autoencoder's {stage.downsampling}")
    latent = (stage.latent_channels, side, side)
    pixels = (config.resolution, config.resolution)
    small = config.resolution // LOWRES_FACTOR
    conditions = {
        "boxes": (Member(name="cond.boxes", shape=(MOST_BOXES, 5), dtype="float16"),),
        "labels": (Member(name="cond.labels", shape=pixels, dtype="uint8"),),
        "lowres": (Member(name="cond.lowres", shape=(3, small, small), dtype="uint8"),),
        "mask": (
            Member(name="cond.mask", shape=pixels, dtype="uint8"),
            Member(name="cond.masked", shape=latent, dtype="float16"),
        ),
    }
    return Contract(
        encoders=portable(config.encoders),
        vae_sha256=stage.weights_sha256,
        text_sha256=text.weights_sha256,
        resolution=config.resolution,
        crop=config.crop,
        resize=RESIZE,
        latent_shape=latent,
        downsampling=stage.downsampling,
        scale=stage.scale,
        shift=stage.shift,
        caption_key=config.caption_key,
        text=TextFacts(layer=text.layer, length=text.length, width=text.width, pad=text.pad, eot=text.eot),
        members=(
            Member(name="moments", shape=(2 * latent[0], *latent[1:]), dtype="float16"),
            Member(name="text", shape=(text.length, text.width), dtype="float16"),
            *(member for name in sorted(config.conditions) for member in conditions[name]),
        ),
        batch=config.batch,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        versions={name: version(name) for name in PACKAGES},
    )


def portable(encoders: EncodersConfig) -> dict[str, Any]:
    """The encoders' configuration without this machine's paths: of an absolute one, only the last part."""
    fields = asdict(encoders)
    for name in ("vae", "text", "text_pretrained"):
        fields[name] = without_folders(fields[name])
    return fields


def without_folders(path: str) -> str:
    """An absolute local path's last part; anything else as it is."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", "~")) else path


def contract_digest(contract: Contract) -> str:
    """Identity of a contract."""
    return hashlib.sha256(canonical_json(asdict(contract))).hexdigest()


def read_plan(storage: Storage) -> tuple[Contract, dict[str, Any]] | None:
    """The contract that this destination was begun under and the rest of its plan, or None when it is fresh."""
    try:
        plan = json.loads(storage.get(PLAN))
        return contract_from_json(plan["contract"]), plan
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DestinationExists(f"{storage.url}/{PLAN} cannot be read ({error}): choose another dest") from None


def agree(
    storage: Storage,
    contract: Contract,
    source: str,
    units: list[Unit],
    begun: tuple[Contract, dict[str, Any]] | None,
) -> None:
    """Begins the destination with this plan, or checks that it was begun with it. Raises DestinationExists."""
    names = [unit.name for unit in units]
    if begun is None:
        plan = {"contract": asdict(contract), "source": without_folders(source), "units": names}
        if storage.put_if_absent(PLAN, canonical_json(plan)):
            return
        begun = read_plan(storage)
        assert begun is not None
    differences = begun[0].differences(contract)
    if differences:
        raise DestinationExists(
            f"{storage.url} was begun with other settings ({'; '.join(differences)}): use those, or choose another dest"
        )
    if begun[1]["units"] != names:
        raise DestinationExists(
            f"{storage.url} was begun with {len(begun[1]['units'])} input shards ({begun[1]['source']}) that are not "
            f"the {len(names)} of source={source}: give the same ones, or choose another dest"
        )
