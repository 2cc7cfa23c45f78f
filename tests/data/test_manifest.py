"""data/format/manifest.py: its bytes are canonical, it is committed once, and a manifest that does not fit is
refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made.cache import contract, make_cache
from pipeline.data.format.contract import plain, require_match
from pipeline.data.format.contract_json import contract_from_json
from pipeline.data.format.manifest import MANIFEST, commit_manifest, load_manifest, manifest_bytes, parse_manifest
from pipeline.errors import ContractMismatch, DatasetError, DestinationExists
from pipeline.storage.urls import open_storage


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), [3, 2])
    again = load_manifest(open_storage(str(tmp_path)))
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.samples == 5
    assert manifest_bytes(again) == (tmp_path / MANIFEST).read_bytes()
    assert contract_from_json(plain(manifest.contract)) == manifest.contract


def test_the_digest_changes_with_any_field(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), [3, 2])
    shard = dataclasses.replace(manifest.shards[0], sha256="d" * 64)
    changed = [
        dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:])),
        dataclasses.replace(manifest, contract=contract(scale=0.6)),
        dataclasses.replace(manifest, sources=("other",)),
    ]
    assert len({manifest.digest, *(other.digest for other in changed)}) == 4


def test_a_manifest_is_committed_once_and_an_identical_one_again(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), [3])
    storage = open_storage(str(tmp_path))
    commit_manifest(storage, manifest)
    with pytest.raises(DestinationExists, match="another"):
        commit_manifest(storage, dataclasses.replace(manifest, sources=("other",)))
    with pytest.raises(DestinationExists, match="another"):
        commit_manifest(storage, dataclasses.replace(manifest, version=3))
    assert load_manifest(storage) == manifest


def test_a_new_version_follows_the_one_before_and_leaves_it_readable(tmp_path: Path) -> None:
    manifest = make_cache(str(tmp_path), [3])
    storage = open_storage(str(tmp_path))
    second = dataclasses.replace(manifest, version=2, sources=("a", "b"))
    assert commit_manifest(storage, second) is True
    assert commit_manifest(storage, second) is False
    assert load_manifest(storage) == second
    assert parse_manifest(storage.get(manifest.name)) == manifest


def test_what_is_not_a_dataset_says_what_to_do(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with pytest.raises(DatasetError, match="encode it first"):
        load_manifest(storage)
    storage.put("000000.tar", b"x")
    with pytest.raises(DatasetError, match="not finished"):
        load_manifest(storage)


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.update(format=99),
        lambda v: v.pop("shards"),
        lambda v: v.update(extra=1),
        lambda v: v["shards"][0].pop("sha256"),
        lambda v: v["contract"].update(unknown=1),
        lambda v: v.update(statistics=None),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    value = json.loads(manifest_bytes(make_cache(str(tmp_path), [2])))
    damage(value)
    with pytest.raises(DatasetError):
        parse_manifest(json.dumps(value).encode())
    with pytest.raises(DatasetError):
        parse_manifest(b"\xff{")


def test_caches_of_other_encoders_are_refused_with_the_difference() -> None:
    require_match(contract(), contract(batch=8, resolution=32), "data.val=x")
    with pytest.raises(ContractMismatch, match=r"data\.val=x .*scale: 0.7, not 0.5"):
        require_match(contract(), contract(scale=0.7), "data.val=x")
    with pytest.raises(ContractMismatch, match="vae_sha256: dddddddddddd, not aaaaaaaaaaaa"):
        require_match(contract(), contract(vae_sha256="d" * 64), "data.val=x")
