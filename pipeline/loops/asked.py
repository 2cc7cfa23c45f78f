"""What open_dataset is asked for, and whether that can be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.data.format.contract import Contract
from pipeline.data.format.members import OF_CAPTIONS, dtypes_of, has_several, text_member
from pipeline.errors import ConfigError

LATENTS = "latents"
"""Name of the scaled latents that are drawn, in a batch."""
Url = str | os.PathLike[str]
"""A folder or the URL of a bucket."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The parameters of open_dataset, with the place that they have led to."""

    urls: tuple[str, ...]
    batch: int
    seed: int
    rank: int
    world: int
    samples: int | None
    sampled: bool
    members: tuple[str, ...] | None
    captions: bool
    weights: tuple[float, ...]
    columns: tuple[str, ...]
    tail: str
    memory_gb: float
    workers: int
    prefetch: int
    cache: str
    cache_gb: float
    device: str


def listed(name: str, values: Iterable[Url]) -> tuple[str, ...]:
    """What was given as the list `name`. Raises ConfigError for one text, whose letters would be taken for names."""
    if isinstance(values, str | os.PathLike):
        raise ConfigError(f"{name}={os.fspath(values)!r} is one name: give a list, {name}=[{os.fspath(values)!r}]")
    return tuple(os.fspath(value) for value in values)


def check(asked: Asked) -> None:
    """Raise ConfigError for values that can be known to be wrong before a cache is opened."""
    if not asked.urls or not all(asked.urls):
        raise ConfigError("no cache is named: give a folder or URL that `latentmill encode` wrote")
    if not 0 <= asked.seed < 1 << 64:
        raise ConfigError(f"seed={asked.seed}: a whole number from 0 to 2**64 - 1 is wanted")
    if asked.batch < 1 or asked.batch % asked.world:
        raise ConfigError(
            f"batch={asked.batch} is the global batch, which {asked.world} ranks share evenly: give a multiple of "
            f"{asked.world}"
        )
    if len(asked.urls) == 1 and asked.weights:
        raise ConfigError("weights are of several caches, and one is named: leave weights out")
    possible = all(0 < weight < math.inf for weight in asked.weights)
    if asked.weights and (len(asked.weights) != len(asked.urls) or not possible):
        raise ConfigError(f"weights={list(asked.weights)}: a positive number for each of the {len(asked.urls)} caches")
    if asked.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device={asked.device}: cpu, or cuda for a GPU, such as cuda:0")
    if asked.samples is not None and asked.samples < 1:
        raise ConfigError(f"samples={asked.samples}: at least 1, or None for an iteration without end")


def arrays_of(asked: Asked, contract: Contract) -> tuple[str, ...]:
    """Names of the arrays that a batch is made of. Raises ConfigError for one that records do not hold."""
    held = [name for name in dtypes_of(contract) if name != "captions"]
    if asked.members is None:
        return tuple(held)
    drawn = {LATENTS: contract.stored} if asked.sampled else {}
    names = tuple(dict.fromkeys(drawn.get(name, name) for name in asked.members))
    require_held(names, held, asked.urls[0])
    return names


def require_held(names: Iterable[str], held: Sequence[str], url: str) -> None:
    """Raise ConfigError where `names` has arrays that the records at `url` do not hold."""
    if unknown := [name for name in names if name not in held]:
        made = "with captions and text_storage=full" if "text" in unknown else "with those conditions"
        raise ConfigError(
            f"{url} holds no {', '.join(unknown)}: its arrays are {', '.join(held)}; name some of these, or encode it "
            f"{made}"
        )


def read_beside(asked: Asked, arrays: Sequence[str], contracts: Sequence[Contract]) -> tuple[str, ...]:
    """Names of the arrays that are read for what they say and left out of a batch: which of several captions a sample
    sees is drawn from an array of them. arrays: those of a batch. contracts: of all caches."""
    texts = [contract.text for contract in contracts if contract.text is not None]
    several = [has_several(text) for text in texts]
    if not asked.captions or not any(several) or set(OF_CAPTIONS) & set(arrays):
        return ()
    return ("tokens",) if all(several) else (text_member(texts[0]).name,)
