"""Whether datasets that are named apart are apart: by what they hold, not by how their places are spelt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest

Named = tuple[str, "Manifest"]
"""("data.train=cache", its manifest)."""


def require_distinct(training: Sequence[Named], validation: Named | None = None) -> None:
    """Raise ConfigError where two training caches are one dataset, or the validation captions are of one. Datasets are
    one where they have a shard in common: a copy, a link, another URL or a later version.

    training: data.train, then each of data.mix. validation: data.val.
    """
    for number, (name, manifest) in enumerate(training):
        for other, other_manifest in training[:number]:
            if shared := _shared(manifest, other_manifest):
                raise ConfigError(
                    f"{name} and {other} are the same dataset ({shared}); give it once, with a larger weight"
                )
    for name, manifest in training if validation else ():
        assert validation is not None
        if shared := _shared(manifest, validation[1]):
            raise ConfigError(
                f"{validation[0]} is the training cache {name} ({shared}); captions must be ones that training never "
                "sees"
            )


def _shared(one: Manifest, other: Manifest) -> str:
    """What two datasets have in common, in words; "" for nothing."""
    if one.digest == other.digest:
        return f"manifest {one.digest[:12]}"
    shards = {shard.sha256 for shard in one.shards}.intersection(shard.sha256 for shard in other.shards)
    return f"{len(shards)} shards of {len(other.shards)} are the same" if shards else ""
