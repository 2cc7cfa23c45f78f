"""Shards as img2dataset writes them go through encode and verify unchanged (docs/how_to/img2dataset.md).

img2dataset wants another webdataset than latentmill, so it cannot run here. A shard that it wrote is held here instead,
and the builder of the others is held to that shard's bytes.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset.writer
from PIL import Image

from made.img2dataset_shard import FACTS, Row, real_shard, write_shard
from pipeline import cli

CAPTIONS = [
    "a café by the sea — “summer”",
    "кошка на окне 🐈",
    "two\nlines\r\nand a third",
    'she said "hello", twice; it\'s 5\'9"',
    "  white space around\t",
    "null",
    "",
    None,
]
WRITTEN = sum(bool(caption) for caption in CAPTIONS)


def picture(seed: int, kind: str) -> bytes:
    """A gradient with grain; sizes and shapes differ."""
    chance = random.Random(seed)
    size = chance.randint(48, 200), chance.randint(48, 200)
    grain = np.random.default_rng(seed)
    smooth = Image.fromarray(grain.integers(0, 256, (2, 3, 3), dtype=np.uint8)).resize(size)
    noisy = (np.asarray(smooth) + grain.normal(0, 5, (size[1], size[0], 3))).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).save(out, kind)
    return out.getvalue()


def row(shard: int, number: int, image: bytes, caption: str | None, **columns: Any) -> Row:
    width, height = Image.open(io.BytesIO(image)).size
    facts = dict.fromkeys(("url", *FACTS[1:]))
    facts |= {"url": f"http://localhost/{number}.x.jpg?a=1", "status": "success", "exif": "{}", "sha256": "0" * 64}
    facts |= {"width": width, "height": height, "original_width": width * 2, "original_height": height * 2}
    return Row(f"{shard:05d}{number:04d}", image, caption, columns, facts)


def members(*tars: Path) -> dict[str, bytes]:
    found = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


def cached(folder: Path) -> dict[str, dict[str, Any]]:
    """The json of each record of a cache, by the sample's key."""
    found = [json.loads(data) for name, data in members(*folder.glob("*.tar")).items() if name.endswith(".json")]
    assert len({meta["key"] for meta in found}) == len(found)
    return {meta["key"]: meta for meta in found}


def reports(folder: Path) -> list[dict[str, Any]]:
    """What encode says of each input shard, in order."""
    told = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    return sorted((report for report in told if "passed_over" in report), key=lambda report: report["unit"])


IN_THREADS = "decode_in=threads"
"""One test starts decoding processes, as the verb does by itself; the others need not."""


def encode(source: str, dest: Path, *words: str) -> None:
    """latentmill encode with the demo's encoders, in small batches."""
    words = (f"source={source}", f"dest={dest}", "encoders=demo", "batch=8", "launch.threads=1", *words)
    assert cli.main(["encode", *words]) == 0


def test_the_builder_writes_the_bytes_that_img2dataset_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(fileobj=io.BytesIO(real_shard())) as tar:
        infos = tar.getmembers()
        data = {info.name: tar.extractfile(info).read() for info in infos}  # type: ignore[union-attr]
    rows = []
    for key in dict.fromkeys(info.name.partition(".")[0] for info in infos):
        facts = json.loads(data[f"{key}.json"])
        assert tuple(facts)[-len(FACTS) :] == FACTS and facts["key"] == key
        columns = {name: facts.pop(name) for name in ("similarity", "punsafe", "aesthetic", "NSFW")}
        caption = facts.pop("caption")
        del facts["key"]
        rows.append(Row(key, data[f"{key}.jpg"], caption, columns, facts))
    # TarWriter asks for the time once per member; tarfile reads it back from the pax header.
    clock = iter([float(info.pax_headers["mtime"]) for info in infos])
    monkeypatch.setattr(webdataset.writer, "time", types.SimpleNamespace(time=lambda: next(clock)))
    write_shard(tmp_path / "00000.tar", "jpg", rows)
    assert (tmp_path / "00000.tar").read_bytes() == real_shard()


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, list[Row]]:
    """A shard of each encode_format, and one of which nothing could be fetched; the rows of all."""
    folder, rows = tmp_path / "shards", list[Row]()
    folder.mkdir()
    for shard, (suffix, kind) in enumerate([("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]):
        mine = [row(shard, 2 * i, picture(10 * shard + i, kind), caption) for i, caption in enumerate(CAPTIONS)]
        random.Random(shard).shuffle(mine)  # as downloads end
        write_shard(folder / f"{shard:05d}.tar", suffix, mine)
        rows += mine
    write_shard(folder / "00003.tar", "jpg", [])
    return folder, rows


def test_every_success_is_cached_with_its_caption_whatever_the_encode_format(
    shards: tuple[Path, list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = shards
    source, dest = f"{folder}/{{00000..00003}}.tar", tmp_path / "c"
    encode(source, dest, "max_rejects=0.25")
    wanted = {one.key: one for one in rows if one.caption}
    found = cached(dest)
    assert {key: meta["caption"] for key, meta in found.items()} == {
        key: (one.caption or "").strip() for key, one in wanted.items()
    }
    assert {key: (meta["width"], meta["height"]) for key, meta in found.items()} == {
        key: (one.facts["width"], one.facts["height"]) for key, one in wanted.items()
    }
    told = reports(dest)
    empty = {"caption_empty": len(CAPTIONS) - WRITTEN}
    assert [(report["read"], report["rejected"]) for report in told] == [(len(CAPTIONS), empty)] * 3 + [(0, {})]
    assert not any(report["passed_over"] for report in told)
    assert cli.main(["verify", f"dataset={dest}", f"source={source}", "min_psnr=0", "samples=8"]) == 0
    assert "every hash right" in capsys.readouterr().out


@pytest.mark.parametrize(("caption_key", "reason"), [("txt", "caption_empty"), ("json:caption", "caption_missing")])
def test_the_shard_that_img2dataset_wrote_is_encoded_and_what_lies_beside_it_is_not_asked_for(
    tmp_path: Path, caption_key: str, reason: str
) -> None:
    write_shard(tmp_path / "00000.tar", "jpg", [])  # for the parquet and the json
    (tmp_path / "00000.tar").write_bytes(real_shard())
    dest = tmp_path / "c"
    encode(f"{tmp_path}/*.tar", dest, IN_THREADS, "max_rejects=0.5", f"caption_key={caption_key}")
    (report,) = reports(dest)
    assert (report["read"], report["accepted"], report["passed_over"]) == (2, 1, 0)
    assert report["rejected"] == {reason: 1}
    found = cached(dest)
    assert found["000000000"]["caption"] == 'кошка 🐈 \n "two" lines'
    assert (found["000000000"]["width"], found["000000000"]["height"]) == (16, 16)


def test_files_that_were_stored_as_fetched_are_read_by_what_they_hold(tmp_path: Path) -> None:
    """disable_all_reencoding: anything may stand under .jpg, and the json has no sizes."""
    jpeg = picture(0, "JPEG")
    gif = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(gif, "GIF")
    stored = {
        "image_truncated": jpeg[: len(jpeg) // 2],
        "image_unreadable": b"<!DOCTYPE html><html></html>",
        "a gif": gif.getvalue(),
        "empty": b"",
        "a jpeg": jpeg,
        "a png": picture(1, "PNG"),
        "a webp": picture(2, "WEBP"),
    }
    rows = []
    for number, (caption, image) in enumerate(stored.items()):
        one = row(0, number, jpeg, caption)
        facts = one.facts | dict.fromkeys(("width", "height", "original_width", "original_height"))
        del facts["sha256"]  # compute_hash=None
        rows.append(one._replace(image=image, facts=facts))
    write_shard(tmp_path / "00000.tar", "jpg", rows)
    encode(f"{tmp_path}/00000.tar", tmp_path / "c", IN_THREADS, "max_rejects=0.6")
    (report,) = reports(tmp_path / "c")
    assert report["rejected"] == {"image_truncated": 1, "image_unreadable": 3}
    assert {meta["caption"] for meta in cached(tmp_path / "c").values()} == {"a jpeg", "a png", "a webp"}


def test_columns_that_img2dataset_carries_can_be_filtered_by(tmp_path: Path) -> None:
    """Rows without a value, null or NaN, are defects; so is a column that was not carried."""
    values = [(0.31, 0.01), (0.29, 0.01), (0.31, 0.2), (None, 0.01), (0.31, float("nan")), (0.5, 0.0)]
    rows = [
        row(0, number, picture(number, "JPEG"), f"caption {number}", similarity=similarity, punsafe=punsafe)
        for number, (similarity, punsafe) in enumerate(values)
    ]
    write_shard(tmp_path / "00000.tar", "jpg", rows)
    source, rules = f"{tmp_path}/00000.tar", ["filters.keep=similarity>=0.3", "filters.keep=punsafe<0.1"]
    encode(source, tmp_path / "c", IN_THREADS, "max_rejects=0.5", *rules)
    (report,) = reports(tmp_path / "c")
    missing = {"column_missing:similarity": 1, "column_missing:punsafe": 1}
    assert report["rejected"] == {"filter:similarity>=0.3": 1, "filter:punsafe<0.1": 1, **missing}
    assert {meta["caption"] for meta in cached(tmp_path / "c").values()} == {"caption 0", "caption 5"}
    words = [f"source={source}", f"dest={tmp_path}/d", "encoders=demo", IN_THREADS, "launch.threads=1"]
    assert cli.main(["encode", *words, "filters.keep=aesthetic>5"]) == 1
