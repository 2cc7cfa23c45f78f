"""The cache that a run expects, where none is there yet: the keys of encode that make it, and its contract.

An experiment's file says in a comment what its cache is. Here the same is said in keys, so that a plan needs no other
word than experiment=NAME; keys that are given after `encode.` win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config import AutoencoderConfig, RunConfig, TrainConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.members import arrays_of
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Expected:
    """What an experiment expects of its cache. words: keys of encode. downsampling: pixels per latent position of an
    autoencoder that no group of encoders names; 0 = that of the encoders."""

    words: tuple[str, ...]
    downsampling: int = 0


def _of(text: str, downsampling: int = 0) -> Expected:
    return Expected(tuple(text.split()), downsampling)


SHAPES, PIXELS, SMALL = "encoders=demo resolution=[64]", "stored=pixels resolution=[384]", "stored=pixels"
LDM = "resolution=[256] text_storage=none"
EXPECTED: dict[str, Expected] = {
    **{name: _of(SHAPES) for name in ("demo", "shapes", "shapes_unconditional")},
    "shapes_transformer": _of(f"{SHAPES} text_storage=tokens"),
    "shapes_class": _of(f"{SHAPES} conditions=[class] classes.count=24"),
    "shapes_classifier": _of(f"{SHAPES} conditions=[class] classes.count=24"),
    "shapes_layout": _of(f"{SHAPES} conditions=[boxes] boxes.count=25 boxes.most=6"),
    "shapes_semantic": _of(f"{SHAPES} conditions=[labels] labels.count=25"),
    "shapes_superres": _of(f"{SHAPES} conditions=[lowres]"),
    "shapes_inpaint": _of(f"{SHAPES} conditions=[mask] mask.variants=4"),
    "sd1_256": _of("encoders=sd1 resolution=[256]"),
    "sd2_512": _of("encoders=sd2 resolution=[512]"),
    "ldm_text": _of("encoders=sd1 resolution=[256] text_storage=tokens"),
    "ldm4_unconditional": _of(LDM, 4),
    "ldm4_class": _of(f"{LDM} conditions=[class] classes.count=1000", 4),
    "ldm4_layout": _of(f"{LDM} conditions=[boxes] boxes.count=600", 4),
    "ldm4_semantic": _of(f"{LDM} crop=random conditions=[labels] labels.count=182 labels.grid=4", 4),
    "ldm4_superres": _of(f"{LDM} conditions=[lowres]", 4),
    "ldm4_inpainting": _of(f"{LDM} conditions=[mask] mask.convention=ldm", 4),
    "ldm8_class": _of(f"{LDM} conditions=[class] classes.count=1000", 8),
    "ldm8_classifier": _of(f"{LDM} conditions=[class] classes.count=1000", 8),
    "ldm8_layout": _of(f"{LDM} conditions=[boxes] boxes.count=80", 8),
    **{name: _of(SMALL) for name in ("kl_small", "vq_small")},
    **{name: _of(PIXELS) for name in ("kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f8", "vq_f8_n256", "vq_f16")},
}
"""Of each shipped experiment. Numbers of classes are those of ImageNet, of OpenImages' boxes and of COCO's things."""
CONDITIONS = {"class": "classes.count=1000", "boxes": "boxes.count=600", "labels": "labels.count=182"}
"""Number of classes of a condition of which nothing is said; it changes an embedding's rows, and no array."""


def expected_words(experiment: str, config: RunConfig, given: Sequence[str]) -> tuple[list[str], int]:
    """Keys of encode for the cache of a run, and its downsampling where no encoders say it (0 = they do).

    experiment: that was chosen, "" for none. given: keys of encode that the user has given, which replace those of the
    same name. Without an experiment that is known they follow from the task.
    """
    known = EXPECTED.get(experiment)
    words = list(known.words if known else _by_task(config))
    own = {_key(word) for word in given}
    if "conditions" in own:
        own |= {"classes.count", "boxes.count", "boxes.most", "labels.count", "labels.grid", "mask.variants"}
    words = [word for word in words if _key(word) not in own]
    return [*words, *given], known.downsampling if known and "encoders" not in own else 0


def _by_task(config: RunConfig) -> list[str]:
    """Keys for a run without an experiment."""
    if not isinstance(config, TrainConfig):
        return ["stored=pixels"]
    names = config.task.conditions
    words = [f"conditions=[{','.join(names)}]"] if names else []
    words += [CONDITIONS[name] for name in names if name in CONDITIONS]
    if not config.task.takes_text:
        return [*words, "text_storage=none"]
    return [*words, "text_storage=tokens"] if "tokens" in config.task.members else words


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def fitted(contract: Contract, config: RunConfig, downsampling: int) -> Contract:
    """The contract of a run's cache. downsampling: of an autoencoder that is not known, whose latents are then taken to
    have the model's channels; 0 = the contract's own. Raises ConfigError where a model cannot be trained on it."""
    if isinstance(config, AutoencoderConfig):
        if contract.stored != "pixels":
            raise ConfigError("an autoencoder is trained on pixels: give encode.stored=pixels")
        return contract
    assert isinstance(config, TrainConfig), "no other verb trains"
    model, side = config.model, contract.resolution
    if downsampling and contract.stored != "pixels":
        if side % downsampling:
            raise ConfigError(f"encode.resolution={side} is no multiple of downsampling={downsampling}")
        sides = side // downsampling
        contract = replace(
            contract, latent_shape=(model.in_channels, sides, sides), downsampling=downsampling, members=()
        )
        contract = replace(contract, members=arrays_of(contract))
    if contract.latent_shape[0] != model.in_channels:
        raise ConfigError(
            f"model.in_channels={model.in_channels}, and the cache's latents have {contract.latent_shape[0]} channels: "
            "give encode.encoders of the model, or downsampling=F for an autoencoder that is not known"
        )
    text = contract.text
    if text is not None and "text" in config.task.members and text.width != model.context_width:
        raise ConfigError(
            f"model.context_width={model.context_width}, and the cache's text states have {text.width} numbers: give "
            "encode.encoders of the model"
        )
    missing = set(config.task.conditions) - _held(contract)
    if missing:
        raise ConfigError(f"task={config.task.name} wants encode.conditions=[{','.join(config.task.conditions)}]")
    if config.task.takes_text and text is None:
        raise ConfigError(f"task={config.task.name} reads captions, and encode.text_storage=none stores none")
    return contract


def _held(contract: Contract) -> set[str]:
    """The conditions of a cache, as `conditions=` of encode names them."""
    held = contract.conditions
    found = {"class": held.classes, "boxes": held.boxes, "labels": held.labels, "lowres": held.lowres}
    return {name for name, facts in {**found, "mask": held.mask}.items() if facts is not None}
