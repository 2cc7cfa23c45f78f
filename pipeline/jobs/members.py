"""The members of a sweep: the command line of each, and its folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import CONFIGS
from pipeline.config.loading.merge import flat_types
from pipeline.config.loading.overrides import expand, translate, typed_words
from pipeline.config.loading.sweeps import folder_word, without_references
from pipeline.errors import ConfigError
from pipeline.verbs import TRAINS

LONGEST = 200
"""Longest name in bytes: file systems take 255, and what is written beside a folder has a longer name."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep. name: its swept keys and values. words: its command line, as one would type it for this run
    alone."""

    name: str
    words: tuple[str, ...]


def members_of(verb: str, key: str, root: str, words: Sequence[str]) -> list[Member]:
    """The members of a sweep over a verb, in the order in which Hydra expands it.

    key: names the destination of the verb. root: the folder under which each member gets its own. words: all others of
    the command line. Raises OverrideError, and ConfigError where nothing is swept, or two members would share a folder.
    """
    swept, combinations = expand(translate(verb, words, sweep=True))
    if not swept or not combinations:
        raise ConfigError("-m sweeps over values such as optim.lr=1e-4,2e-4, and none is given")
    kinds = dict(flat_types(CONFIGS[verb]))
    named = os.environ.get("WANDB_RUN_GROUP") or any(word.lstrip("+").startswith("tracking.group=") for word in words)
    grouped = verb in TRAINS and not named
    group = [f"tracking.group={without_references(root.rsplit('/', 1)[-1])}"] if grouped else []
    suffix = ".png" if verb == "sample" else ""  # a picture, and no folder
    members: dict[str, Member] = {}
    for combination in combinations:
        typed = [(word.split("=")[0], typed_words(word, kinds)) for word in (w.removeprefix("++") for w in combination)]
        name = ",".join(folder_word(*word.split("=", 1)) for name, plain in typed if name in swept for word in plain)
        folder = job_folder(name)
        if folder in members:
            raise ConfigError(f"the sweep has {folder} twice: give each value once")
        own = [word for _, plain in typed for word in plain]
        members[folder] = Member(name, (*own, *group, f"{key}={root}/{folder}{suffix}"))
    return list(members.values())


def job_folder(words: str) -> str:
    """The name of a job's folder: its swept keys and values, as in optim.lr=1e-4,model=tiny. What is longer than
    LONGEST is cut, and ends with a digest of the whole, so that equal words always get the same folder."""
    parts = words.split("/")  # values may be paths
    return "/".join(part if len(part.encode()) <= LONGEST else _cut(part, words) for part in parts)


def _cut(part: str, words: str) -> str:
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{part.encode()[: LONGEST - 20].decode(errors='ignore')}...{digest}"
