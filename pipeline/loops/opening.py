"""Opens the caches that a loop of one's own reads: in the version that is asked for, with their columns, found to fit
each other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from pipeline.data.format.contract import OF_ANY_SIZE, Contract, require_match
from pipeline.data.format.manifest import Manifest, find_version, load_manifest
from pipeline.data.format.members import dtypes_of
from pipeline.data.joined.opening import joined, require_all_bound
from pipeline.data.order.dataset import Dataset, Part, part_of
from pipeline.distributed.place import Place, launcher_place, only_place, step_place
from pipeline.errors import ConfigError, ContractMismatch, DatasetError, LatentmillError
from pipeline.loops.asked import LATENTS
from pipeline.runs.datasets import require_conditions
from pipeline.runs.distinct import require_distinct
from pipeline.storage.urls import open_storage

KEYS = re.compile(r"(?<![\w/.-])(?:data|optim)\.(memory_gb|cache|cache_gb|weights|columns|tail|batch)\b")
"""Keys of the command line that are parameters here, of the same names."""
CACHES = re.compile(r"(?<![\w/.-])data\.(?:train|mix)(?: and data\.(?:train|mix))*\b")
"""Those that are `url` here."""
CONDITION = "cond."
"""Begins the names of the arrays that are conditions."""
OF_FACTS = {"masked": "mask"}
"""Conditions that the facts of another describe."""


@contextmanager
def as_parameters() -> Iterator[None]:
    """Messages that name keys of the command line, such as data.memory_gb, name the parameters instead."""
    try:
        yield
    except LatentmillError as error:
        message = CACHES.sub("url", KEYS.sub(r"\1", str(error)))
        if message != str(error):
            raise type(error)(message) from None
        raise


def place_of(rank: int | None, world: int | None) -> Place:
    """The place that is given; where none is, that of torch.distributed where it has begun, else what torchrun,
    accelerate, deepspeed or srun say in the environment, else that of the only process. Raises ConfigError."""
    import torch.distributed as dist

    if (rank is None) != (world is None):
        raise ConfigError("rank and world belong together: give both, or none of them to take what the launcher says")
    if rank is not None and world is not None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank={rank} and world={world}: ranks are 0 to {max(world, 1) - 1}")
        return Place(rank, world, 0, 1)
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size(), 0, 1)
    return launcher_place() or step_place() or only_place()


def open_caches(
    urls: Sequence[str],
    columns: Sequence[str] = (),
    members: Sequence[str] | None = None,
    digests: Sequence[str] = (),
) -> Dataset:
    """The caches at `urls` as one dataset, the first as what the others must fit. members: arrays that will be read;
    None = all. digests: of the manifests of the versions to open; () = the newest ones.

    Raises DatasetError where there is no cache, or not that version, ContractMismatch for caches, conditions and
    columns that do not fit, and ConfigError for a cache that is named twice.
    """
    if digests and len(digests) != len(urls):
        raise ConfigError(f"the state is of {len(digests)} caches, and {len(urls)} are open: open the same ones")
    parts = [_part(url, columns, digest) for url, digest in zip(urls, digests or [""] * len(urls), strict=True)]
    manifests = [part.manifest for part in parts]
    require_all_bound(columns, manifests, "the caches that are opened")
    require_distinct(list(zip(urls, manifests, strict=True)))
    first = manifests[0].contract
    read = set(dtypes_of(first))
    if members is not None:
        read &= {first.stored if name == LATENTS else name for name in members}
    names = {name.removeprefix(CONDITION) for name in read if name.startswith(CONDITION)}
    conditions = sorted({OF_FACTS.get(name, name) for name in names})
    for url, manifest in zip(urls[1:], manifests[1:], strict=True):
        require_match(first, manifest.contract, url, OF_ANY_SIZE)
        _require_dtypes(first, manifest.contract, url, read)
        require_conditions(conditions, first, manifest.contract, url, f"the first cache, {urls[0]}")
    return Dataset(parts)


def _part(url: str, columns: Sequence[str], digest: str) -> Part:
    storage = open_storage(url)
    manifest: Manifest | None = load_manifest(storage)
    if digest and manifest is not None and manifest.digest != digest:
        newest, manifest = manifest.digest, find_version(storage, digest)
        if manifest is None:
            raise DatasetError(
                f"{url} holds no version whose manifest is {digest[:12]}, which the state is of (it has "
                f"{newest[:12]}): restore it, or begin without the state"
            )
    return part_of(storage, joined(storage, columns, manifest))


def _require_dtypes(first: Contract, other: Contract, url: str, read: Collection[str]) -> None:
    wanted, found = dtypes_of(first), dtypes_of(other)
    wanted = {name: dtype for name, dtype in wanted.items() if name in read}
    if differing := sorted(name for name in wanted if found.get(name) != wanted[name]):
        name = differing[0]
        raise ContractMismatch(
            f"{url} holds {name} as {found.get(name, 'nothing')}, not {wanted[name]} as the first cache does: encode "
            "it with the same encoders and conditions, or name the members that both have"
        )
