"""Pixels as PNGs: written without loss, read strictly, decoded in the stream's threads, and named where they are
damaged."""

from __future__ import annotations

import dataclasses
import io
import itertools
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.conditioned import make_conditioned, record
from made.conditions import CONTRACTS
from made.forged_cache import forge_records, joined
from pipeline.data.format.contract import Contract, plain, require_match
from pipeline.data.format.contract_json import contract_digest, contract_from_json
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.members import most_png_bytes
from pipeline.data.format.pixels import png_bytes, png_size, read_png
from pipeline.data.format.records import npy_bytes, pack
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading import batch as module
from pipeline.data.reading.batch import collate
from pipeline.data.reading.reader import Reader
from pipeline.data.reading.shards import first_records
from pipeline.data.reading.stream import Stream
from pipeline.errors import ParseError, ShardCorrupt
from pipeline.storage.urls import open_storage

ARRAY, PNG = CONTRACTS["pixels"], CONTRACTS["pixels as PNGs"]
CROP = (16, 16)


@pytest.fixture(autouse=True)
def _plan_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("PLAN_BATCHES", 4), ("PLAN_SAMPLES", 4), ("HORIZON_BATCHES", 4)):
        monkeypatch.setattr(f"pipeline.data.reading.stream.{name}", number)


def pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 3), (64, 64), (257, 33)])
def test_pixels_come_back_from_a_png_to_the_bit(size: tuple[int, int]) -> None:
    ramp = np.arange(3 * size[0] * size[1], dtype=np.int64).reshape(size[1], size[0], 3).astype(np.uint8)
    for image in (pixels(*size), np.zeros_like(ramp), ramp, pixels(*size)[:, ::-1]):
        data = png_bytes(image)
        assert (data.dtype, data.ndim, png_size(data)) == (np.uint8, 1, size)
        assert len(data) <= most_png_bytes(size)
        read = read_png(data, size)
        assert read.flags.c_contiguous and (read == image.transpose(2, 0, 1)).all()
        out = np.full((3, size[1], size[0]), 7, dtype=np.uint8)
        assert read_png(data, size, out) is out and (out == read).all()


GOOD = png_bytes(pixels(6, 4)).tobytes()
START, END = GOOD[:33], chunk(b"IEND", b"")
WRONG: dict[str, tuple[bytes, str]] = {
    "another size": (png_bytes(pixels(4, 6)).tobytes(), "not 8-bit RGB of 6 x 4 pixels"),
    "grey": (saved(Image.fromarray(pixels(6, 4)[..., 0])), "not 8-bit RGB"),
    "grey and alpha": (saved(Image.fromarray(pixels(6, 4)[..., :2].copy(), "LA")), "not 8-bit RGB"),
    "alpha": (saved(Image.fromarray(pixels(6, 4)).convert("RGBA")), "not 8-bit RGB"),
    "palette": (saved(Image.fromarray(pixels(6, 4)).convert("P")), "not 8-bit RGB"),
    "empty": (b"", "no PNG"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(50), "no PNG"),
    "cut": (GOOD[:-20], "cut"),
    "without an end": (GOOD[:-12], "other chunks"),
    "header alone": (START + END, "other chunks"),
    "a flipped bit": (GOOD[:60] + bytes([GOOD[60] ^ 1]) + GOOD[61:], "checksum"),
    "another chunk": (START + chunk(b"tEXt", b"k\0v") + GOOD[33:], "other chunks"),
    "bytes after the end": (GOOD + b"x", "cut"),
    "two headers": (START + START[8:] + GOOD[33:], "other chunks"),
    "no pixels": (START + chunk(b"IDAT", b"") + END, "decoded"),
    "not deflated": (START + chunk(b"IDAT", bytes(40)) + END, "decoded"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_another_png_than_encode_writes_is_refused_in_one_line(kind: str) -> None:
    data, words = WRONG[kind]
    with pytest.raises(ShardCorrupt, match=words) as told:
        read_png(data, (6, 4))
    assert "\n" not in str(told.value)


def stream_pixels(folder: Path, one: Contract, **settings: Any) -> list[np.ndarray]:
    make_conditioned(str(folder), one, [9, 8])
    storage = open_storage(str(folder))
    dataset = dataset_of(storage, load_manifest(storage))
    with Stream(dataset, dataset.order(3, 4), batch=4, members=("pixels",), **settings) as stream:
        return [next(stream).tensors["pixels"].numpy().copy() for _ in range(6)]


def test_the_stream_gives_the_same_pixels_of_arrays_and_of_pngs(tmp_path: Path) -> None:
    arrays = stream_pixels(tmp_path / "array", ARRAY)
    for workers in (1, 3):
        pngs = stream_pixels(tmp_path / f"png{workers}", PNG, workers=workers)
        for mine, other in zip(arrays, pngs, strict=True):
            assert mine.dtype == other.dtype == np.uint8 and mine.shape == other.shape == (4, 3, 16, 16)
            assert (mine == other).all()


def test_pngs_are_decoded_in_the_streams_own_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()

    def noted(*given: Any) -> np.ndarray:
        names.add(threading.current_thread().name.rpartition("_")[0])
        return read_png(*given)

    monkeypatch.setattr(module, "read_png", noted)
    stream_pixels(tmp_path, PNG)
    assert names == {"latentmill-pixels"}


def test_records_that_are_read_in_place_have_pixels_as_arrays(tmp_path: Path) -> None:
    make_conditioned(str(tmp_path / "array"), ARRAY, [5])
    make_conditioned(str(tmp_path / "png"), PNG, [5])
    found = []
    for name in ("array", "png"):
        storage = open_storage(str(tmp_path / name))
        found.append([r.members["pixels"] for r in first_records(storage, load_manifest(storage), 5, ("pixels",))])
    assert all((mine == other).all() for mine, other in zip(*found, strict=True))


def test_arrays_and_pngs_are_mixed_in_one_batch(tmp_path: Path) -> None:
    """Caches that differ in how they store pixels serve one model."""
    require_match(ARRAY, PNG, "data.mix")
    blocks = []
    for name, one in (("array", ARRAY), ("png", PNG)):
        make_conditioned(str(tmp_path / name), one, [3])
        storage = open_storage(str(tmp_path / name))
        blocks.append(Reader(dataset_of(storage, load_manifest(storage)), members=("pixels",)).read(0))
    records = [(blocks[i % 2], i % 3) for i in range(6)]
    batch = collate(0, np.arange(6), records, ("pixels",), 0, lambda count: np.empty(count, np.uint8))
    expected = np.stack([record(ARRAY, 0, i % 3, CROP).members["pixels"] for i in range(6)])
    assert (batch.tensors["pixels"].numpy() == expected).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD, "not 8-bit RGB of 16 x 16"),
        (b"", r"pixels is uint8 \(0,\)|no PNG"),
        (bytes(most_png_bytes(CROP) + 1), r"pixels is uint8 \(\d+,\), not uint8"),
    ],
)
def test_a_png_that_is_not_its_records_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    make_conditioned(str(tmp_path), PNG, [5])
    records = []
    for row in range(5):
        files = pack(record(PNG, 0, row, CROP))
        new = npy_bytes(np.frombuffer(data, np.uint8))
        records.append(joined([(n, new if row == 2 and n.endswith("pixels.npy") else old) for n, old in files]))
    forge_records(tmp_path, records)
    storage = open_storage(str(tmp_path))
    dataset = dataset_of(storage, load_manifest(storage))
    with (
        Stream(dataset, dataset.order(0, 4), batch=4, members=("pixels",)) as stream,
        pytest.raises(ShardCorrupt, match=words) as told,
    ):
        list(itertools.islice(stream, 2))
    assert str(tmp_path) in str(told.value)
    with pytest.raises(ShardCorrupt, match=words):
        list(first_records(storage, load_manifest(storage), 5, ("pixels",)))


def test_a_contract_says_png_only_where_that_is_so() -> None:
    assert "pixels" not in plain(ARRAY) and plain(PNG)["pixels"] == "png"
    assert contract_from_json(plain(PNG)) == PNG
    assert contract_digest(PNG) != contract_digest(ARRAY)
    for wrong in (plain(ARRAY) | {"pixels": "array"}, plain(PNG) | {"pixels": "jpeg"}, plain(PNG) | {"pixels": None}):
        with pytest.raises(ParseError, match="pixels"):
            contract_from_json(wrong)
    with pytest.raises(ParseError, match="pixels=png: stored=pixels is wanted"):
        contract_from_json(plain(dataclasses.replace(CONTRACTS["latents"], pixels="png")))


DIGESTS = {
    "text": "f3713165010690dfe6025b925aab77b5c79e7838fb263de0da215b8598719b3c",
    "tokens": "c95c6c6c4d8ba0648fdcc3f3cb52707e44a254dec19b14f21c695d6959b8097d",
    "every condition in buckets": "cb5bafd5ca3a004edeb85261b55cad5fc9ed5fc86a6cb68938f07cb0a8ce8c2d",
    "latents": "a85e653e2ba8ab2f18647b7c9b92f93abd1b0401fc31e7d20357f66f13d8bf54",
    "pixels": "7dfe3d5e1c6f3bf367182cbdb10ff1c729b930052ea8aa0815e0523fff2efa8f",
    "pixels in buckets": "b64ee8f06de779445f06be2a4bc6c3646cbc831e7d993f4634c7a554ab6a2783",
}
"""Of contracts of made.conditions, by the version before pixels could be PNGs."""


@pytest.mark.parametrize("name", DIGESTS)
def test_digests_of_contracts_are_those_of_the_version_before(name: str) -> None:
    """Datasets that were begun before go on, and runs find what they were trained on."""
    assert contract_digest(CONTRACTS[name]) == DIGESTS[name]
