"""Contradictions between the keys of a guide, each refused with one line that says how to resolve it."""

from __future__ import annotations

import dataclasses

from pipeline import config as c
from pipeline.config.steering import ASKED, GuideConfig
from pipeline.config.values.bounds import require

OWNERS = {"target": "image", "mask": "image", "grey": "image", "factor": "image", "cutouts": "clip"} | {
    "run": "classifier",
    "at": "classifier",
}
"""The guide that a key is for."""
EXAMPLES = {
    "prompt": '"a red circle", the caption that it follows',
    "class": "3, or a name, the class that it follows",
    "guide.target": "FILE, the picture to be like",
}
PLACES = ("run", "at", "mask")
"""Keys that say where something is, which no card knows."""


def check_guide_of_sample(config: c.SampleConfig) -> None:
    """The guides of latentmill sample."""
    guide = config.guide
    _check(guide)
    _require_whole(guide, config.tile)
    _require_default(guide, "factor", "here the target's own size says it: leave it out")
    for name, weight in guide.weights.items():
        key = ASKED[name]
        require(weight != 0, f"guide.weight=0 with guide={name} guides nothing: give a weight, or leave the guide out")
        require(
            len(config.asked.get(key, ())) > 0 and all(config.asked[key]),
            f"guide={name} needs {key}: give {key}={EXAMPLES[key]}",
        )


def check_guide_of_eval(config: c.EvalRunConfig) -> None:
    """The guides of latentmill eval."""
    if not config.from_card:
        _check(config.guide)
        _require_whole(config.guide, config.tile)
        _require_default(config.guide, "target", "in eval the target is each record's own picture: leave it out")
        return
    chosen = [f"guide.{key}" for key, value in vars(config.guide).items() if key not in PLACES and value != _of(key)]
    require(not chosen, f"{', '.join(chosen)} with from_card: the card says how images were guided; leave it out")


def _require_whole(guide: GuideConfig, tile: str) -> None:
    """A gradient goes through all of a picture at once."""
    chosen = ",".join(guide.weights)
    require(
        not chosen or tile == "off",
        f"tile={tile} with guide={chosen}: a guide follows its gradient through whole pictures: leave tile out, or "
        "draw smaller pictures",
    )


def _check(guide: GuideConfig) -> None:
    """What holds for both verbs."""
    chosen = tuple(guide.weights)
    for key, owner in OWNERS.items():
        require(
            owner in chosen or getattr(guide, key) == _of(key),
            f"guide.{key} is given without guide={owner}, which it is for: add that, or leave guide.{key} out",
        )
    require(
        bool(chosen) or guide.weight is None,
        f"guide.weight={guide.weight} without a guide: choose one, guide={', '.join(sorted(ASKED))}",
    )
    require(
        len(chosen) < 2 or guide.weight is None,
        f"guide.weight={guide.weight} with guide=[{','.join(chosen)}]: it is for one guide alone; give "
        + " and ".join(f"guide.{name}=" for name in chosen),
    )
    require(
        "classifier" not in chosen or guide.run != "",
        "guide=classifier needs guide.run=RUN, the run of a classifier (latentmill train task=classifier)",
    )


def _of(key: str) -> object:
    """The default of a key."""
    return next(field.default for field in dataclasses.fields(GuideConfig) if field.name == key)


def _require_default(guide: GuideConfig, key: str, why: str) -> None:
    value = getattr(guide, key)
    shown = ",".join(value) if isinstance(value, tuple) else value
    require(value == _of(key), f"guide.{key}={shown}: {why}")
