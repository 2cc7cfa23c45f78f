"""preprocess/index.py: tars of latents that others wrote are adopted whole and unchanged, or refused by name."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from made.cache import LENGTH, WIDTH, make_cache
from made.encode import ENCODERS, files, write_sized
from made.encode import config as encode_config
from pipeline.config import IndexConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.contract import require_match
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import npy_bytes, unpack
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.disk_cache import DiskCache
from pipeline.data.reading.reader import Reader
from pipeline.data.reading.stream import Stream
from pipeline.errors import (
    ConfigError,
    ContractMismatch,
    DataError,
    DestinationExists,
    LatentmillError,
    ShardCorrupt,
    SourceError,
)
from pipeline.inference.trained import load_encoders
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage
from preprocess import encode, index, verify
from preprocess.adopting.scan import LatentShard

COUNTS = (7, 5)
Sample = dict[str, Any]


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams read one epoch of twelve samples here; planning thousands of batches ahead would take most of the
    time."""
    for name, number in (("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8), ("HORIZON_BATCHES", 8)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def sample(tar: int, row: int) -> Sample:
    """One sample as webdataset's writer takes it."""
    rng = np.random.default_rng([tar, row])
    return {
        "__key__": f"some/folder.d/{tar}-picture_{row}",
        "moments.npy": rng.standard_normal((8, 2, 2)).astype(np.float32),
        "text.npy": rng.standard_normal((LENGTH, WIDTH)).astype(np.float16),
        "json": {"caption": f"ein Bild, nämlich {row} von {tar}", "width": 640},
    }


def write(folder: Path, change: Callable[[Sample], object] = lambda one: None, uncond: bool = True) -> None:
    """Tars by webdataset's own writer: pax headers with times and an owner."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=COUNTS[0], verbose=0) as writer:
        for tar, count in enumerate(COUNTS):
            for row in range(count):
                one = sample(tar, row)
                change(one)
                writer.write(one)
    if uncond:
        (folder / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16)))


def only(tar: int, row: int, change: Callable[[Sample], object]) -> Callable[[Sample], None]:
    """`change` for one sample alone."""

    def changed(one: Sample) -> None:
        if one["__key__"] == sample(tar, row)["__key__"]:
            change(one)

    return changed


def config(folder: Path | str, **changes: Any) -> IndexConfig:
    return IndexConfig(**{"dataset": str(folder), "source": f"{folder}/*.tar", **changes})


def refusal(folder: Path | str, kind: type[LatentmillError], **changes: Any) -> str:
    """The line with which indexing is refused; nothing may have been written."""
    before = files(Path(folder))
    with pytest.raises(kind) as caught:
        index.main(config(folder, **changes))
    assert files(Path(folder)) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def streamed(
    url: str, manifest: Manifest, cache: DiskCache | None = None
) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Every record that a stream hands out in one epoch: caption, moments and text by key."""
    storage, found = open_storage(url), dict[str, tuple[str, np.ndarray, np.ndarray]]()
    dataset = dataset_of(storage, manifest, 4000)
    order = dataset.order(3, 1)
    with Stream(dataset, order, batch=1, cache=cache) as stream:
        for _ in range(manifest.samples):
            batch = next(stream)
            moments, text = (batch.tensors[name][0].numpy() for name in ("moments", "text"))
            found[batch.keys[0]] = batch.captions[0], moments, text
    return found


def by_webdataset(folder: Path) -> dict[str, Sample]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {one["__key__"]: one for one in webdataset.WebDataset(urls, shardshuffle=False).decode()}


def same_as_webdataset(folder: Path, url: str = "") -> None:
    """The stream gives what webdataset reads: all of it, to the bit."""
    url = url or str(folder)
    manifest = load_manifest(open_storage(url))
    ours, theirs = streamed(url, manifest), by_webdataset(folder)
    assert manifest.samples == len(theirs) == sum(COUNTS)
    assert ours.keys() == theirs.keys()
    for key, (caption, moments, text) in ours.items():
        assert caption == theirs[key]["json"]["caption"]
        for mine, name in ((moments, "moments.npy"), (text, "text.npy")):
            assert mine.dtype == theirs[key][name].dtype
            assert (mine == theirs[key][name]).all()


def test_an_adopted_cache_streams_what_webdataset_reads_and_its_tars_are_not_touched(tmp_path: Path) -> None:
    write(tmp_path)
    before = files(tmp_path)
    assert index.main(config(tmp_path)) == 0
    assert files(tmp_path).items() >= before.items()
    same_as_webdataset(tmp_path)
    manifest = load_manifest(open_storage(str(tmp_path)))
    assert [(unit.read, unit.accepted, unit.rejected) for unit in manifest.units] == [(7, 7, {}), (5, 5, {})]
    moments = np.stack([sample(t, r)["moments.npy"] for t, n in enumerate(COUNTS) for r in range(n)])[:, :4]
    np.testing.assert_allclose(manifest.statistics.mean, moments.mean(axis=(0, 2, 3)) * 0.18215, rtol=1e-5)
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0


def test_a_cache_on_s3_is_adopted_where_it_lies(s3: str, tmp_path: Path) -> None:
    write(tmp_path)
    storage = open_storage(f"{s3}/theirs")
    for name, data in files(tmp_path).items():
        storage.put(f"deep/{name}", data)
    storage.put("uncond.npy", (tmp_path / "uncond.npy").read_bytes())
    assert index.main(config(storage.url, source=f"{s3}/theirs/deep/part-{{000..001}}.tar")) == 0
    same_as_webdataset(tmp_path, storage.url)


def test_running_it_again_changes_nothing_and_another_source_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    index.main(config(tmp_path))
    before = files(tmp_path)
    assert index.main(config(tmp_path)) == 0
    assert files(tmp_path) == before
    one = str(tmp_path / "part-000.tar")
    assert "not the 1 of source=" in refusal(tmp_path, DestinationExists, source=one)
    assert "scale: 0.18215, not 0.5" in refusal(tmp_path, DestinationExists, scale=0.5)
    write(tmp_path, only(1, 2, lambda one: one.update(json={"caption": "other"})))
    assert ".index.json is there, and not what" in refusal(tmp_path, DestinationExists)


@pytest.mark.parametrize("place", ["cut", "header", "tail"])
def test_a_damaged_tar_is_refused_by_name(tmp_path: Path, place: str) -> None:
    write(tmp_path)
    path = tmp_path / "part-001.tar"
    data = bytearray(path.read_bytes())
    if place == "cut":
        del data[-12_000:]
    elif place == "header":
        data[data.index(b"picture_3.text.npy")] ^= 1
    else:
        data += b"more"
    path.write_bytes(data)
    assert "part-001.tar, byte " in refusal(tmp_path, ShardCorrupt)


def test_a_byte_that_flips_later_is_found_by_stream_and_verify(tmp_path: Path) -> None:
    write(tmp_path)
    index.main(config(tmp_path))
    path = tmp_path / "part-000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardCorrupt, match="SHA-256"):
        streamed(str(tmp_path), load_manifest(open_storage(str(tmp_path))))
    with pytest.raises(DataError, match=r"part-000\.tar"):
        verify.main(VerifyConfig(dataset=str(tmp_path)))


def as_pickle(one: Sample) -> None:
    one["moments.pth"] = one.pop("moments.npy")


def as_object(one: Sample) -> None:
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object), allow_pickle=True)
    one["moments.npy"] = out.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_pickle, "moments.pth is a pickle"),
        (as_object, "holds object; read are float16, float32"),
        (lambda one: one.pop("text.npy"), "text.npy is not there (it has json, moments.npy)"),
        (lambda one: one.update({"moments.npy": np.zeros((8, 2, 3), np.float32)}), "moments is not float32 (8, 2, 2)"),
        (lambda one: one.update({"moments.npy": np.zeros((8, 2, 2), np.float16)}), "moments is not float32 (8, 2, 2)"),
        (lambda one: one.update({"text.npy": np.zeros((2, WIDTH), np.float16)}), f"float16 ({LENGTH}, {WIDTH})"),
        (lambda one: one["text.npy"].__setitem__((0, 0), np.nan), "text holds NaN"),
        (lambda one: one.update(json={"words": 1}), "caption"),
        (lambda one: one.update(json={"caption": ""}), "no caption"),
        (lambda one: one.update(json=b"{"), "json cannot be read"),
        (lambda one: one.update(__key__="some/folder.d/1-picture_1"), "there twice"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_by_name_or_left_out_and_counted(
    tmp_path: Path, change: Callable[[Sample], object], words: str
) -> None:
    write(tmp_path, only(1, 2, change))
    line = refusal(tmp_path, SourceError)
    assert "part-001.tar, byte " in line and words in line and ("picture_2" in line or "picture_1" in line)
    twice = words == "there twice"  # a neighbour of the same key: both are one record, which is wrong
    assert index.main(config(tmp_path, max_rejects=0.2)) == 0
    manifest = load_manifest(open_storage(str(tmp_path)))
    assert [unit.accepted for unit in manifest.units] == [7, 3 if twice else 4]
    assert sum(manifest.rejected.values()) == 1
    found = streamed(str(tmp_path), manifest)  # blocks span the bytes of what is left out
    assert len(found) == manifest.samples
    assert "some/folder.d/1-picture_2" not in found
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0
    assert "more than max_rejects=0.01" in refusal_after(tmp_path, 0.01)


def refusal_after(folder: Path, max_rejects: float) -> str:
    with pytest.raises(SourceError) as caught:
        index.main(config(folder, max_rejects=max_rejects))
    return str(caught.value)


def test_a_key_that_comes_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, only(0, 5, lambda one: one.update(__key__=sample(0, 1)["__key__"])))
    assert "a record some/folder.d/0-picture_1 stands in the tar before" in refusal(tmp_path, SourceError)


def test_plain_latents_and_what_is_no_latent_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "plain", lambda one: one.update({"moments.npy": np.zeros((4, 2, 2), np.float32)}))
    assert "0-picture_0: moments.npy has shape (4, 2, 2), and moments are (8, h, w)" in refusal(
        tmp_path / "plain", SourceError
    )
    assert "without its log-variance: give stored=latents" in refusal(tmp_path / "plain", SourceError)
    assert "with its log-variance: give stored=moments" in refusal(
        tmp_path / "plain", SourceError, stored="latents", channels=2
    )
    assert "it is neither" in refusal(tmp_path / "plain", SourceError, channels=3)
    write(tmp_path / "flat", lambda one: one.update({"text.npy": np.zeros(5, np.float32)}))
    assert "text.npy has shape (5,), text states are (L, D)" in refusal(tmp_path / "flat", SourceError)
    write(tmp_path / "named", lambda one: one.update({"a.npy": one.pop("moments.npy")}))
    assert "moments_member=" in refusal(tmp_path / "named", SourceError)


def test_only_tars_below_the_dataset_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert "does not lie below" in refusal(tmp_path / "b", ConfigError, source=f"{tmp_path}/a/*.tar")
    assert "not named .tar" in refusal(tmp_path / "a", ConfigError, source=f"{tmp_path}/a/*")


def test_without_an_empty_caption_it_says_where_to_get_one(tmp_path: Path) -> None:
    write(tmp_path, uncond=False)
    assert "encoders=" in refusal(tmp_path, LatentmillError)
    (tmp_path / "uncond.npy").write_bytes(npy_bytes(np.zeros((LENGTH, 1), np.float32)))
    assert f"not finite states ({LENGTH}, {WIDTH})" in refusal(tmp_path, LatentmillError)


def test_unknown_encoders_prove_nothing(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write(tmp_path / name)
        index.main(config(tmp_path / name))
    contracts = [load_manifest(open_storage(str(tmp_path / name))).contract for name in ("train", "val")]
    assert contracts[0].vae_sha256 == contracts[0].text_sha256 == ""
    with pytest.raises(ContractMismatch, match=r"data\.val=v cannot be proved to fit.*encoders=NAME"):
        require_match(contracts[0], contracts[1], "data.val=v")
    with pytest.raises(ContractMismatch, match="does not know its encoders"):
        load_encoders(contracts[0])


def test_encoders_are_proved_by_the_text_states_and_make_the_empty_caption(tmp_path: Path) -> None:
    tower = load_text(ENCODERS)

    def encoded(one: Sample) -> None:
        one["text.npy"] = tower.encode(tower.tokenize([one["json"]["caption"]]))[0].half().numpy()

    write(tmp_path, encoded, uncond=False)
    wrong = refusal(tmp_path, ContractMismatch, encoders=dataclasses.replace(ENCODERS, seed=2))
    assert "0-picture_0: the text tower of encoders= gives states that differ" in wrong
    assert index.main(config(tmp_path, encoders=ENCODERS)) == 0
    manifest = load_manifest(open_storage(str(tmp_path)))
    assert manifest.contract.text_sha256 == tower.weights_sha256
    load_encoders(manifest.contract)
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0
    empty = np.load(tmp_path / "uncond.npy")
    np.testing.assert_allclose(empty, tower.encode(tower.tokenize([""]))[0].numpy(), atol=1e-3)


def test_our_own_cache_gets_its_indexes_and_manifest_back_to_the_byte(tmp_path: Path) -> None:
    write_sized(tmp_path / "0.tar", [(70, 64)] * 5)
    write_sized(tmp_path / "1.tar", [(64, 70)] * 3, 5)
    cache = tmp_path / "cache"
    encode.main(encode_config(f"{tmp_path}/*.tar", cache, flip=True, text_storage="trimmed", conditions=("lowres",)))
    before, manifest = files(cache), load_manifest(open_storage(str(cache)))
    lost = [name for name in before if name.endswith(".index.json") or name == "manifest.json" or "units/" in name]
    for name in lost:
        (cache / name).unlink()
    assert index.main(config(cache)) == 0
    assert files(cache) == {name: data for name, data in before.items() if "units/" not in name}
    for name in (*(name for name in lost if "units/" not in name), "manifests/000001.json"):
        (cache / name).unlink()
    assert index.main(config(cache)) == 0  # without any copy: what the tars and contract.json say
    again = load_manifest(open_storage(str(cache)))
    assert again.contract == manifest.contract
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in manifest.shards]
    assert again.statistics == pytest.approx(manifest.statistics)
    assert verify.main(VerifyConfig(dataset=str(cache))) == 0


def test_a_dataset_of_encode_with_its_manifest_is_left_alone(tmp_path: Path) -> None:
    make_cache(str(tmp_path), [3])
    assert "not of `latentmill index`" in refusal(tmp_path, DestinationExists)


def test_members_of_other_names_are_read_by_a_layout(tmp_path: Path) -> None:
    layout = {"moments": "npy", "text": "clip.npy", "caption": "json:prompt"}
    one = sample(0, 0)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write(
            {
                "__key__": one["__key__"],
                "npy": one["moments.npy"],
                "clip.npy": one["text.npy"],
                "moments.npy": np.zeros(3, np.float32),
                "json": {"prompt": "words", "caption": "none"},
                "txt": "other words",
                "cls": 3,
            }
        )
    ((key, start, data, names),) = LatentShard(open_storage(str(tmp_path)), "a.tar", LimitsConfig()).groups()
    assert (key, start, sorted(names)) == (one["__key__"], 0, ["clip.npy", "cls", "json", "moments.npy", "npy", "txt"])
    found = unpack(data, ("moments", "text"), layout=layout)
    assert (found.key, found.meta) == (one["__key__"], {"caption": "words"})
    assert (found.members["moments"] == one["moments.npy"]).all()
    assert (found.members["text"] == one["text.npy"]).all()
    assert unpack(data, ("moments",), layout={**layout, "caption": "txt"}).meta == {"caption": "other words"}
    with pytest.raises(ShardCorrupt, match=r"has no t5\.npy"):
        unpack(data, ("text",), layout={**layout, "text": "t5.npy"})
    with pytest.raises(ShardCorrupt, match="json:words cannot be read"):
        unpack(data, layout={**layout, "caption": "json:words"})


@pytest.mark.parametrize("caption_key", ["txt", "json:nested.prompt"])
def test_an_adopted_cache_of_other_names_streams_what_webdataset_reads(tmp_path: Path, caption_key: str) -> None:
    def renamed(one: Sample) -> None:
        one["latent.npy"], one["clip.npy"] = one.pop("moments.npy"), one.pop("text.npy")
        words = one.pop("json")["caption"]
        if caption_key == "txt":
            one["txt"] = words
        else:
            one["json"] = {"nested.prompt": words, "caption": "not this"}
        one["cls"], one["mask.npy"], one["extra.pth"] = 3, np.zeros((2, 2), np.uint8), b"never opened"

    write(tmp_path, renamed)
    names = {"moments_member": "latent.npy", "text_member": "clip.npy", "caption_key": caption_key}
    assert "moments_member=" in refusal(tmp_path, SourceError)
    assert index.main(config(tmp_path, **names)) == 0
    manifest = load_manifest(open_storage(str(tmp_path)))
    ours = streamed(str(tmp_path), manifest)
    assert len(ours) == manifest.samples == sum(COUNTS)
    for tar, count in enumerate(COUNTS):
        for row in range(count):
            one = sample(tar, row)
            caption, moments, text = ours[one["__key__"]]
            assert caption == one["json"]["caption"]
            assert (moments == one["moments.npy"]).all()
            assert (text == one["text.npy"]).all()
    kept = DiskCache(tmp_path.parent / f"{tmp_path.name}-kept", 10**9)
    for _ in range(2):  # fetched, then from the local disk
        again = streamed(str(tmp_path), manifest, kept)
        assert again.keys() == ours.keys()
        assert all(again[key][0] == ours[key][0] and (again[key][1] == ours[key][1]).all() for key in ours)
    assert verify.main(VerifyConfig(dataset=str(tmp_path))) == 0
    assert "text_member" not in refusal(tmp_path, DestinationExists, **{**names, "scale": 1.0})


def test_other_tar_writers_are_read(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        folder = tmp_path / str(form)
        write(folder)
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as opened:
                members = [(one.name, opened.extractfile(one).read()) for one in opened]  # type: ignore[union-attr]
            with tarfile.open(path, "w", format=form) as tar:
                tar.addfile(_folder("some/folder.d"))
                for name, payload in members:
                    long = name.replace("picture", "p" * (120 if form == tarfile.GNU_FORMAT else 40))
                    info = tarfile.TarInfo(long)
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        index.main(config(folder))
        same_as_webdataset(folder)


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_a_block_is_one_ranged_read_whatever_lies_between_its_records(tmp_path: Path) -> None:
    write(tmp_path, only(0, 3, as_pickle))
    index.main(config(tmp_path, max_rejects=0.5))
    storage = open_storage(str(tmp_path))
    manifest = load_manifest(storage)
    block = Reader(dataset_of(storage, manifest)).read(0)
    assert [block.record(place).key for place in range(6)] == [sample(0, row)["__key__"] for row in (0, 1, 2, 4, 5, 6)]
