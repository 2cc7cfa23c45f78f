"""What an encode would make: the source as far as it was looked at, and a cache of each resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipeline.config import EncodeConfig
from pipeline.data.format.contract import Contract
from pipeline.data.format.members import arrays_of
from pipeline.errors import ConfigError
from pipeline.planning.cached.facts import contracts_of
from pipeline.planning.cached.size import CacheSize, cache_bytes
from pipeline.planning.cached.trial import Trial, trial

TextStorage = Literal["full", "trimmed", "tokens"]
UNIT_ROWS = 10_000
"""Images of an input shard where no source is looked at: img2dataset's."""


@dataclass(frozen=True)
class PlannedCache:
    """The cache of one resolution. contract: as it would be, but for hashes and versions. size: of what is asked for.
    by_text: of each way of keeping captions; {} without captions."""

    contract: Contract
    size: CacheSize
    by_text: dict[str, CacheSize]


@dataclass(frozen=True)
class PlannedEncode:
    """caches: one for each resolution. source: what was looked at; None where nothing was. images: that are stored.
    unit_rows: images of each input shard, or of all of them."""

    caches: tuple[PlannedCache, ...]
    source: Trial | None
    images: int
    unit_rows: int | tuple[int, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of the source; 0 where it is not known."""
        return self.source.source_bytes if self.source else 0


def plan_encode(
    config: EncodeConfig, images: int = 0, shards: int = 4, tokens: Callable[[str], int] | None = None
) -> PlannedEncode:
    """What an encode makes of config.source, of whose tars `shards` are tried; of `images` images, where that is given,
    or without any source.

    tokens: number of a caption's tokens with start and end; None = estimated by words. Raises ConfigError where neither
    images nor a trial says how many there are; and what `trial` and `contracts_of` raise.
    """
    contracts = contracts_of(config)
    source = trial(config, contracts, shards, tokens) if config.source else None
    counted = source.images if source else 0
    if not (images or counted):
        raise ConfigError("images=0: give images=N, a finished cache as data.train=, or source= with trial=1 or more")
    rows: int | tuple[int, ...] = source.unit_rows if source and counted else UNIT_ROWS
    if images and counted and images != counted:  # the source's shards, with so many images in proportion
        assert isinstance(rows, tuple)
        rows = _scaled(rows, images)
    elif images and source and not counted:
        rows = max(1, -(-images // max(source.shards, 1)))
    samples = source.samples if source else ()
    name = source.name if source else "00000.tar"
    each = source.source_bytes // max(source.shards, 1) if source else 0

    def size_of(contract: Contract, target: int) -> CacheSize:
        return cache_bytes(
            images or counted, contract, rows, samples=samples, target=target, name=name, source_bytes=each
        )

    caches = []
    for target, contract in enumerate(contracts):
        kinds = get_args(TextStorage) if contract.text is not None else ()
        by_text = {kind: size_of(with_text(contract, kind), target) for kind in kinds}
        caches.append(PlannedCache(contract, size_of(contract, target), by_text))
    return PlannedEncode(tuple(caches), source, images or counted, rows)


def with_text(contract: Contract, storage: TextStorage) -> Contract:
    """The contract of a cache that keeps its captions in another way."""
    assert contract.text is not None, "no captions"
    changed = replace(contract, text=replace(contract.text, storage=storage))
    return replace(changed, members=arrays_of(changed))


def _scaled(rows: tuple[int, ...], images: int) -> tuple[int, ...]:
    """Rows in the same proportions that add up to `images`."""
    total, before, scaled = sum(rows), 0, []
    for count in rows:
        scaled.append((before + count) * images // total - before * images // total)
        before += count
    return tuple(scaled)
