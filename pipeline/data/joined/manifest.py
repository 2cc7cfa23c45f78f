"""A cache and its columns as one manifest: whoever reads records by it gets both as one record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.excluded import load_excluded, union
from pipeline.data.format.manifest import Manifest
from pipeline.data.joined.binding import Bound
from pipeline.errors import ContractMismatch
from pipeline.storage.base import Storage

TEXTS = ("text", "tokens", "captions")
"""Arrays of a cache's captions, in whose place a column's stand."""
TOWER = ("text", "text_pretrained", "text_layer", "text_pad", "text_length")
"""Keys of the encoders' configuration that say which text tower it is."""
MOST_MEMBERS = 64
"""Arrays of a record."""


@dataclass(frozen=True, kw_only=True)
class JoinedManifest(Manifest):
    """The manifest of a cache together with columns.

    Its contract has the arrays of both, and the facts of the columns' text in place of the cache's. Its digest names
    the cache and the columns; own.digest names the cache alone.
    """

    cache: Manifest
    """The cache's own."""
    bound: tuple[Bound, ...]
    """Its columns, in the order of their digests."""

    @property
    def own(self) -> Manifest:
        return self.cache

    @property
    def columns(self) -> tuple[Bound, ...]:
        return self.bound

    @cached_property
    def digest(self) -> str:
        digests = [self.cache.digest, *(one.columns.digest for one in self.bound)]
        return hashlib.sha256(canonical_json(digests)).hexdigest()


def join(storage: Storage, manifest: Manifest, columns: Sequence[Bound]) -> Manifest:
    """The manifest of a cache at `storage` with its columns; its own where there are none. Raises ContractMismatch when
    two have an array of one name, DatasetError."""
    if not columns:
        return manifest
    bound = tuple(sorted(columns, key=lambda one: one.columns.digest))
    contract = joined_contract(manifest.contract, bound)
    excluded = union(load_excluded(storage, manifest), [one.excluded for one in bound])
    parts = {fact.name: getattr(manifest, fact.name) for fact in fields(Manifest)}
    text = next((one.columns for one in bound if one.has_text), None)
    parts |= {"contract": contract, "excluded": len(excluded)}
    parts |= {"uncond_sha256": text.uncond_sha256} if text else {}
    return JoinedManifest(**parts, cache=manifest, bound=bound)


def joined_contract(contract: Contract, bound: Sequence[Bound]) -> Contract:
    """The contract of a cache with columns. Raises ContractMismatch."""
    members = list(contract.members)
    holders: dict[str, str] = {}
    for one in bound:
        facts = one.columns.contract
        for key in ("text" if name in TEXTS else name for name in facts.names):
            if key in holders:
                raise ContractMismatch(f"{holders[key]} and {one.storage.url} both hold {key}: name one of them alone")
            holders[key] = one.storage.url
        if facts.text is not None:
            members = [member for member in members if member.name not in TEXTS]
            tower = {name: facts.encoders[name] for name in TOWER if name in facts.encoders}
            contract = replace(
                contract,
                text=facts.text,
                text_sha256=facts.text_sha256,
                caption_key=facts.caption_key,
                encoders={**contract.encoders, **tower},
            )
        members += facts.members
    if len(members) > MOST_MEMBERS:
        raise ContractMismatch(f"the cache and its columns have {len(members)} arrays, and {MOST_MEMBERS} are read")
    return replace(contract, members=tuple(members))
