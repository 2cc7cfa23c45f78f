"""The contracts of the caches that a configuration of `encode` would make, without encoders and without PyTorch.

They hold what sizes follow from. What only proves a cache is not known before it is made: hashes of weights are zeros,
versions of packages placeholders, of equal lengths.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.conditions.names import read_names
from pipeline.config import EncodeConfig
from pipeline.data.format.contract import Contract, Member, TextFacts, stored_filters, stored_limits
from pipeline.data.format.crops import bucket_sizes
from pipeline.data.format.members import arrays_of
from pipeline.errors import ConfigError, NotFound
from pipeline.planning.cached.encoders import StageFacts, stage_facts, tower_facts
from pipeline.storage.urls import open_storage, split_url, without_folders

UNPROVED = "0" * 64
VERSIONS = dict.fromkeys(("diffusers", "numpy", "open_clip_torch", "pillow", "torch"), "0.00.0")
NO_ARRAYS = (Member(name="moments", shape=(), dtype="float16"),)


def contracts_of(config: EncodeConfig) -> tuple[Contract, ...]:
    """A contract for each of config.resolution. Reads configuration files of encoders and files of names. Raises
    ConfigError for sizes that the encoders cannot take."""
    stage = stage_facts(config.used_encoders)
    text = text_facts(config)
    conditions = conditions_of(config)
    return tuple(_contract(config, side, stage, text, conditions) for side in config.resolution)


def _contract(
    config: EncodeConfig, side: int, stage: StageFacts, text: TextFacts | None, conditions: Conditions
) -> Contract:
    factor, sizes = stage.downsampling, bucket_sizes(side, config.buckets, config.bucket_aspect)
    if side % factor or any(one % factor for size in sizes for one in size):
        raise ConfigError(f"resolution={side}, buckets={config.buckets}: no multiple of the autoencoder's {factor}")
    encoders = asdict(config.used_encoders) | {
        name: without_folders(getattr(config.used_encoders, name)) for name in ("vae", "text", "text_pretrained")
    }
    del encoders["weights"]
    contract = Contract(
        encoders=encoders,
        vae_sha256=UNPROVED,
        text_sha256=UNPROVED if text else "",
        resolution=side,
        buckets=sizes,
        crop=config.crop,
        seed=config.seed,
        flip=config.flip,
        filters=stored_filters(config.filters),
        limits=stored_limits(config.limits),
        resize="lanczos",
        latent_shape=(stage.channels, side // factor, side // factor),
        downsampling=factor,
        scale=stage.scale,
        shift=stage.shift,
        stored=stage.stored,
        pixels=config.pixels if stage.stored == "pixels" else "array",
        caption_key=config.caption_places[0] if text else "",
        text=text,
        conditions=conditions,
        colour=config.colour or "srgb",
        clip_sha256=UNPROVED if text and config.filters.clip_score else "",
        members=NO_ARRAYS,
        batch=config.batch,
        device="cpu" if config.device == "cpu" else "cuda",
        threads=0,
        versions=VERSIONS | _libraries(config),
    )
    return replace(contract, members=arrays_of(contract))


def _libraries(config: EncodeConfig) -> dict[str, str]:
    """What is named besides the packages, where it is used (preprocess/encoding/contract.py)."""
    found = {"png": "zlib-ng 0.0.0, level 4"} if config.pixels == "png" else {}
    found |= {"littlecms": "0.00"} if config.colour != "as_stored" else {}
    return found | ({"perceptual_hash": "phash 1"} if config.filters.near_duplicates else {})


def text_facts(config: EncodeConfig) -> TextFacts | None:
    """The facts of the captions that a configuration asks for; None where none are stored. Raises ConfigError."""
    storage, places = config.text_kind, config.caption_places
    if storage == "none" or not places:
        return None
    encoders, tower = config.encoders, tower_facts(config.encoders)
    several = config.captions > 1
    facts = TextFacts(
        storage=storage,
        layer=encoders.text_layer,
        length=encoders.text_length,
        width=tower.width,
        pad=encoders.text_pad,
        eot=tower.vocabulary - 1,  # CLIP's last
        captions=config.captions,
        keys=places if several else (),
        weights=config.caption_weights if several else (),
    )
    return replace(facts, vocabulary=tower.vocabulary, start=tower.vocabulary - 2) if storage == "tokens" else facts


def conditions_of(config: EncodeConfig) -> Conditions:
    """The facts of the conditions that a configuration asks for, as far as sizes follow from them. Reads the files of
    names. Raises ConfigError."""
    asked, masks, lowres = config.conditions, config.mask, config.lowres
    return Conditions(
        classes=ClassFacts(key=config.classes.key, **_counted("classes", config.classes)) if "class" in asked else None,
        boxes=(
            BoxFacts(most=config.boxes.most, min_area=config.boxes.min_area, **_counted("boxes", config.boxes))
            if "boxes" in asked
            else None
        ),
        labels=(
            LabelFacts(grid=config.labels.grid, offset=config.labels.offset, **_counted("labels", config.labels))
            if "labels" in asked
            else None
        ),
        lowres=(
            LowresFacts(factor=lowres.factor, degradation=lowres.degradation, variants=lowres.variants)
            if "lowres" in asked
            else None
        ),
        mask=MaskFacts(kinds=masks.kinds, variants=masks.variants) if "mask" in asked else None,
        pixels="pixels" in asked,
    )


def _counted(group: str, config: Any) -> dict[str, Any]:
    """`count` and `names` of a group of keys. Of classes that folders name, which are not listed here, the count is 1:
    no array's size depends on it."""
    if not config.names:
        return {"count": config.count or 1, "names": ()}
    root, key = split_url(config.names)
    try:
        names = read_names(open_storage(root).get(key), config.names)
    except NotFound:
        raise ConfigError(f"{group}.names={config.names}: there is no such file") from None
    return {"count": config.count or len(names), "names": names}
