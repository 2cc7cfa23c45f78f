"""encode, verify and training's reads on a real S3 server: what is made there is what is made on a disk, whatever the
network does (docs/explained/promises.md, 2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from made.encode import config, files
from pipeline.config import FiltersConfig, VerifyConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DataError, ShardCorrupt, StorageError
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.shapes.shards import write_shards
from servers.fault_proxy import Fault, FaultProxy

CHUNK = 40_000  # bytes per read, so that shards of a few images are read in several pieces


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(str(folder), 30, 0, "train", shard_size=15)
    return folder


@pytest.fixture(scope="module")
def made(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What encode makes of them on a disk."""
    dest = tmp_path_factory.mktemp("made") / "c"
    main(config(str(shapes / "{00000..00001}.tar"), dest, filters=FiltersConfig(duplicates="pair")))
    return files(dest)


@pytest.fixture
def source(shapes: Path, s3: str) -> str:
    storage = open_storage(f"{s3}/in")
    for path in sorted(shapes.iterdir()):
        storage.put(path.name, path.read_bytes())
    return f"{s3}/in/{{00000..00001}}.tar"


def objects(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {info.key: storage.get(info.key) for info in storage.list("")}


def without_source(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what names the source's place, which differs, and what is made of that."""
    named = ("contract.json", "manifest.json", "manifests/000001.json", "card.html")
    return {key: data for key, data in found.items() if key not in named}


def test_a_dataset_on_s3_is_the_one_on_a_disk(
    source: str, s3: str, made: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.source.shard.CHUNK", CHUNK)
    changes = {"filters": FiltersConfig(duplicates="pair")}
    assert main(config(source, f"{s3}/out", **changes)) == 0
    found = objects(f"{s3}/out")
    assert set(found) == set(made)
    assert without_source(found) == without_source(made)
    assert verify.main(VerifyConfig(dataset=f"{s3}/out", source=source, samples=6, min_psnr=0.0)) == 0
    again = objects(f"{s3}/out")
    assert main(config(source, f"{s3}/out", **changes)) == 0
    assert objects(f"{s3}/out") == again


def test_faults_of_the_network_change_nothing(
    source: str, s3: str, made: dict[str, bytes], faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.source.shard.CHUNK", CHUNK)
    monkeypatch.setattr("pipeline.storage.patience.PAUSES", (0.02, 1.0))
    rules = [
        faults.add(Fault(kind="slow_down", every=5)),
        faults.add(Fault(kind="cut", method="GET", key=".tar", every=2, at=9_000)),
        faults.add(Fault(kind="reset", every=7)),
        faults.add(Fault(kind="reset", method="GET", key=".tar", every=3, at=20_000)),
        faults.add(Fault(kind="lose", method="PUT", every=6)),
    ]
    assert main(config(source, f"{s3}/out", filters=FiltersConfig(duplicates="pair"))) == 0
    for rule in rules:
        assert rule.injected > 0, rule.kind
    faults.clear()
    assert without_source(objects(f"{s3}/out")) == without_source(made)


def test_a_byte_that_flips_on_its_way_here_is_no_sample_of_a_published_shard(
    source: str, s3: str, faults: FaultProxy
) -> None:
    """No client checks a hash of a range that it reads: what was read is hashed; verify compares with the source."""
    flip = faults.add(Fault(kind="flip", method="GET", key="00001.tar", times=1, at=300_000))
    try:
        main(config(source, f"{s3}/out"))
    except ShardCorrupt:
        return  # it struck a header or padding
    faults.clear()
    assert flip.injected == 1
    with pytest.raises(DataError, match="is not the shard that was encoded: its SHA-256 differs"):
        verify.main(VerifyConfig(dataset=f"{s3}/out", source=source, samples=2, min_psnr=0.0))


def test_a_store_that_is_gone_for_ever_ends_the_stage_and_leaves_no_dataset(
    source: str, s3: str, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 1.0)
    faults.add(Fault(kind="reset", method="PUT", key="000001.tar"))
    with pytest.raises(StorageError, match=r"000001\.tar"):
        main(config(source, f"{s3}/out"))
    faults.clear()
    assert "manifest.json" not in objects(f"{s3}/out")
    assert main(config(source, f"{s3}/out")) == 0
    manifest = load_manifest(open_storage(f"{s3}/out"))
    assert len(list(first_records(open_storage(f"{s3}/out"), manifest, 99))) == 30
