"""The words of `latentmill plan`: which are its own, which are encode's, and which are those of the verb that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import AutoencoderConfig, PlanConfig, RunConfig, TrainConfig
from pipeline.config.loading.folders import groups

ENCODE = "encode."
RUN, CACHE, HELD_OUT = "planned-run", "planned-cache", "planned-cache-val"
"""Places that stand for those that are not given. Nothing is opened there."""
VERBS: dict[str, type[RunConfig]] = {"train": TrainConfig, "autoencoder": AutoencoderConfig}


@dataclass(frozen=True)
class Words:
    """own: keys of PlanConfig. run: of the verb that trains. encode: of encode, without the prefix. machines: whether a
    cluster is described."""

    own: tuple[str, ...]
    run: tuple[str, ...]
    encode: tuple[str, ...]
    machines: bool

    def verb(self, named: str) -> str:
        """The verb that trains. named: the one that is asked for, "" = what knows the words."""
        if named:
            return named
        keys = {key_of(word).split(".")[0] for word in self.run}
        only = {field.name for field in dataclasses.fields(AutoencoderConfig)} - {
            field.name for field in dataclasses.fields(TrainConfig)
        }
        experiment = self.experiment
        of_autoencoders = experiment in groups("autoencoder")["experiment"] if experiment else False
        return "autoencoder" if of_autoencoders or keys & only else "train"

    @property
    def experiment(self) -> str:
        """The experiment that is chosen; "" for none."""
        return next((word.partition("=")[2] for word in self.run if key_of(word) == "experiment"), "")

    @property
    def filled(self) -> list[str]:
        """The words of the verb that trains, with places that stand for those that are not given."""
        given = {key_of(word) for word in self.run}
        places = {"run": RUN, "data.train": CACHE, "data.val": HELD_OUT}
        return [*(f"{key}={place}" for key, place in places.items() if key not in given), *self.run]


def divided(words: Sequence[str]) -> Words:
    """The words of a command line by whose they are. `encoders=` is of both, where encode has no own."""
    fields = {field.name for field in dataclasses.fields(PlanConfig)}
    own, run, encode, machines = list[str](), list[str](), list[str](), False
    for word in words:
        key = key_of(word)
        if key == "nodes" or key.split(".")[0] == "cluster":
            machines = True
            own.append(f"cluster.{word}" if key == "nodes" else word)
        elif key in fields:
            own.append(word)
        elif key.startswith(ENCODE):
            encode.append(word.replace(ENCODE, "", 1))
        else:
            run.append(word)
    if not any(key_of(word) == "encoders" for word in encode):
        encode = [word for word in run if key_of(word) == "encoders"] + encode
    return Words(tuple(own), tuple(run), tuple(encode), machines)


def key_of(word: str) -> str:
    """The key of KEY=VALUE."""
    return word.lstrip("+~").partition("=")[0]
