"""preprocess/encoding/plan.py: a dataset that was begun in format 2 is found finished, is finished, and grows, in its
format, so that runs on its versions go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from made.encode import config
from made.growing import _encoders, files, run, shard  # noqa: F401  (a fixture that is used by itself)
from pipeline.config import VerifyConfig
from pipeline.config.conditions import BoxesConfig, LowresConfig
from pipeline.data.format.contract import canonical_json
from pipeline.data.format.contract_json import contract_digest, contract_to_json
from pipeline.data.format.manifest import Manifest, find_version, load_manifest, manifest_bytes
from pipeline.errors import DestinationExists
from pipeline.storage.urls import open_storage
from preprocess import encode, verify

SINCE = ("conditions", "colour", "columns")


def as_before(dest: Path) -> Manifest:
    """Writes a finished dataset as the version before would have: contract.json, reports and manifest in format 2."""
    manifest = load_manifest(open_storage(str(dest)))
    assert manifest.format == 3
    before = dataclasses.replace(manifest, format=2)
    plan = json.loads((dest / "contract.json").read_bytes())
    plan["contract"] = contract_to_json(manifest.contract, 2)
    (dest / "contract.json").write_bytes(canonical_json(plan))
    for name in ("manifest.json", "manifests/000001.json"):
        (dest / name).write_bytes(manifest_bytes(before))
    digest = contract_digest(manifest.contract)
    for path in (dest / "units").glob("*[0-9].json"):
        assert json.loads(path.read_bytes())["contract"] == digest
    return before


@pytest.fixture(params=["text", "conditions"])
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any], Manifest]:
    """A dataset of format 2 without or with a condition that it knew, and the settings that made it."""
    changes: dict[str, Any] = {}
    if request.param == "conditions":
        changes = {"conditions": ("lowres",), "lowres": LowresConfig(degradation="box")}
    shard(tmp_path / "a" / "0.tar", 0)
    shard(tmp_path / "a" / "1.tar", 10)
    dest = tmp_path / "cache"
    assert run(tmp_path / "a/*.tar", dest, colour="as_stored", **changes) == 0  # as format 2 has them
    return dest, changes, as_before(dest)


def test_the_same_encode_finds_it_finished(begun: tuple[Path, dict[str, Any], Manifest], tmp_path: Path) -> None:
    dest, changes, before = begun
    held = files(dest)
    assert run(tmp_path / "a/*.tar", dest, **changes) == 0
    assert encode.main(config(str(tmp_path / "a/*.tar"), dest, finalize=True, **changes)) == 0
    now = files(dest)
    assert {name for name in held if held[name] != now[name]} <= {"card.html"}
    assert load_manifest(open_storage(str(dest))).digest == before.digest
    assert verify.main(VerifyConfig(dataset=str(dest), min_psnr=0)) == 0


def test_an_encode_that_was_begun_before_is_finished_to_the_same_bytes(
    begun: tuple[Path, dict[str, Any], Manifest], tmp_path: Path
) -> None:
    dest, changes, _ = begun
    held = files(dest)
    for name in ("manifest.json", "manifests/000001.json", "units/000001.json", "000001.tar", "000001.index.json"):
        (dest / name).unlink()
    assert run(tmp_path / "a/*.tar", dest, **changes) == 0
    now = files(dest)
    assert {name for name in held if held[name] != now[name]} <= {"card.html"}


def test_it_grows_in_its_format_and_the_version_before_stays(
    begun: tuple[Path, dict[str, Any], Manifest], tmp_path: Path
) -> None:
    dest, changes, before = begun
    shard(tmp_path / "a" / "2.tar", 20)
    assert run(tmp_path / "a/*.tar", dest, **changes) == 0
    storage = open_storage(str(dest))
    grown = load_manifest(storage)
    assert (grown.version, grown.format, grown.samples) == (2, 2, 6)
    assert not set(SINCE) & set(json.loads((dest / "manifest.json").read_bytes())["contract"])
    assert find_version(storage, before.digest) == before
    assert grown.contract == before.contract


def test_other_conditions_than_it_has_are_refused_by_name(
    begun: tuple[Path, dict[str, Any], Manifest], tmp_path: Path
) -> None:
    dest, _, before = begun
    shard(tmp_path / "a" / "2.tar", 20)
    changes: dict[str, Any] = {"conditions": ("lowres",), "lowres": LowresConfig(degradation="bicubic")}
    words = "conditions.lowres.degradation: box, not bicubic" if before.contract.conditions.lowres else "conditions.low"
    with pytest.raises(DestinationExists, match=words):
        run(tmp_path / "a/*.tar", dest, **changes)
    with pytest.raises(DestinationExists, match=r"conditions\.boxes: none, not count=9"):
        run(tmp_path / "a/*.tar", dest, conditions=("boxes",), boxes=BoxesConfig(count=9))
