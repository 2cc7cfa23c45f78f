"""filters.near_duplicates: which pictures look alike, how they are found among many, and what becomes of them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from made.encode import config, files, write_tar
from made.hostile import encoded
from pipeline.config import FiltersConfig, VerifyConfig
from pipeline.config.check.verbs import check
from pipeline.data.format.contract import stored_filters
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, DataError
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.encoding.plan import read_plan
from preprocess.filters import near
from preprocess.filters.excluded import find_excluded
from preprocess.filters.near import MOST, masks, near_duplicates
from preprocess.filters.phash import as_numbers, perceptual_hash
from preprocess.source.recipe import recipe_of
from preprocess.source.sample import prepare
from preprocess.source.shard import Sample

# --------------------------------------------------------------------------------------------------------------------
# The search


def one_by_one(hashes: np.ndarray, most: int) -> list[int]:
    """What `near_duplicates` gives, by comparing every hash with all that were kept before."""
    kept, found = list[int](), list[int]()
    for i, value in enumerate(hashes.tolist()):
        near_ones = [j for j in kept if (value ^ int(hashes[j])).bit_count() <= most]
        found.append(near_ones[0] if near_ones else -1)
        if not near_ones:
            kept.append(i)
    return found


def flipped(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@st.composite
def clusters(draw: st.DrawFn) -> np.ndarray:
    """Hashes in a few crowds, in which bits differ here and there."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    bits = st.lists(st.integers(0, 63), max_size=7)
    chosen = draw(st.lists(st.tuples(st.sampled_from(centres), bits), max_size=40))
    return np.array([flipped(*one) for one in chosen], dtype=np.uint64)


@given(clusters(), st.integers(1, MOST), st.sampled_from([(1 << 16, 1 << 20, 256), (5, 1 << 20, 256), (16, 0, 2)]))
@settings(max_examples=120, deadline=None)
def test_each_hash_is_left_out_for_the_first_kept_one_that_is_near(
    hashes: np.ndarray, most: int, sizes: tuple[int, int, int]
) -> None:
    """However many are taken at a time, and however crowded they are."""
    before = near.TOGETHER, near.CROWDED, near.FEW
    near.TOGETHER, near.CROWDED, near.FEW = sizes
    try:
        assert near_duplicates(hashes, most).tolist() == one_by_one(hashes, most)
    finally:
        near.TOGETHER, near.CROWDED, near.FEW = before


def test_of_a_chain_what_is_far_from_all_that_stay_stays() -> None:
    chain = np.array([0, 0x0F, 0xFF, 0xFFF, 0xFFFF], dtype=np.uint64)  # each 4 bits from the next
    assert near_duplicates(chain, 4).tolist() == [-1, 0, -1, 2, -1]
    assert near_duplicates(chain, 3).tolist() == [-1] * 5


@pytest.mark.parametrize("most", range(1, MOST + 1))
def test_planted_pairs_are_found_up_to_the_limit_and_not_beyond(most: int) -> None:
    random = np.random.default_rng(most)
    hashes = random.integers(0, 2**64, 20_000, dtype=np.uint64)
    for distance in range(9):
        for pair in range(200):
            bits = random.choice(64, distance, replace=False).tolist()
            hashes[10_000 + 200 * distance + pair] = flipped(int(hashes[200 * distance + pair]), bits)
    found = near_duplicates(hashes, most)
    for distance in range(9):
        first = 200 * distance + np.arange(200)
        assert (found[10_000 + first] == (first if distance <= most else -1)).all(), distance
    assert (found[:10_000] == -1).all()


def test_any_two_hashes_within_the_limit_meet_in_a_table() -> None:
    """The pigeonhole principle, for every choice of bits of two bands or more that differ."""
    random = np.random.default_rng(0)
    for most in range(1, MOST + 1):
        tables = masks(most)
        assert all(table == int(table) and 0 < int(table) < 2**64 for table in tables)
        for _ in range(500):
            other = flipped(0, random.choice(64, most, replace=False).tolist())
            assert any(other & int(table) == 0 for table in tables)


def test_a_crowd_of_equal_hashes_and_one_of_near_ones_takes_no_time() -> None:
    equal = np.full(200_000, 7, dtype=np.uint64)
    bits = np.random.default_rng(0).integers(0, 64, (20_000, 2)).astype(np.uint64)
    crowd = np.uint64(0xAAAA5555F0F00F0F) ^ (np.uint64(1) << bits[:, 0]) ^ (np.uint64(1) << bits[:, 1])
    found = near_duplicates(np.concatenate([equal, crowd]), 4)
    assert (found[1:200_000] == 0).all()
    assert (found[200_001:] == 200_000).all() and found[200_000] == -1


# --------------------------------------------------------------------------------------------------------------------
# The hash


def scene(number: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    """A smooth picture: noise of 8 x 8 values, enlarged."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def again(image: Image.Image, form: str, **options: object) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, form, **options))).convert("RGB")


def bits_between(one: Image.Image, other: Image.Image) -> int:
    pair = as_numbers(np.frombuffer(perceptual_hash(one) + perceptual_hash(other), np.uint8).reshape(2, 8))
    return int(np.bitwise_count(pair[0] ^ pair[1]))


CHANGES = {
    "jpeg": lambda image: again(image, "JPEG", quality=40),
    "webp": lambda image: again(image, "WEBP", quality=50),
    "smaller": lambda image: image.resize((100, 80), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((500, 400), Image.Resampling.BILINEAR),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "grey": lambda image: image.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_has_a_near_hash(change: str) -> None:
    assert all(bits_between(scene(i), CHANGES[change](scene(i))) <= 4 for i in range(20))


def test_other_pictures_have_hashes_that_are_far_away() -> None:
    distances = [bits_between(scene(i), scene(j)) for i in range(20) for j in range(i)]
    assert min(distances) > 8 and abs(np.mean(distances) - 32) < 2


def test_hashes_are_those_that_caches_hold() -> None:
    """A change of them needs another NAME."""
    assert perceptual_hash(scene(0)).hex() == "fed818c8f313d4c4"
    plain = (Image.new("RGB", (64, 64), colour) for colour in ((200, 10, 10), (0, 0, 0)))
    assert [perceptual_hash(one).hex() for one in plain] == ["8000000000000000"] * 2


def test_copies_have_one_hash_with_random_crops_and_flips_too() -> None:
    filters = FiltersConfig(near_duplicates=4)
    recipe = recipe_of(config("", "", stored="pixels", crop="random", flip=True, filters=filters))
    looks, pixels = set(), set()
    for key in "abcd":
        picture = prepare(Sample(key, {"png": encoded(scene(0, (300, 64)), "PNG")}), recipe, None).pictures[0]
        looks |= {picture.looks, picture.flipped().looks}
        pixels.add(picture.pixels.tobytes())
    assert len(looks) == 1 and len(pixels) == 4


# --------------------------------------------------------------------------------------------------------------------
# Caches

NEAR: dict[str, Any] = {"stored": "pixels", "filters": FiltersConfig(near_duplicates=4), "max_rejects": 0.0}


def write_looks(folder: Path) -> str:
    """Three shards of six samples: of scene i, k of 18, with i = k modulo 8; copies are JPEGs of other qualities."""
    for shard in range(3):
        members = []
        for k in range(6 * shard, 6 * shard + 6):
            members.append((f"{k}.jpg", encoded(scene(k % 8), "JPEG", quality=95 - k)))
        write_tar(folder / f"{shard}.tar", members)
    return str(folder / "{0..2}.tar")


def kept(folder: Path) -> tuple[Manifest, list[str]]:
    storage = open_storage(str(folder))
    manifest = load_manifest(storage)
    return manifest, [record.meta["key"] for record in first_records(storage, manifest, 99)]


def test_of_pictures_that_look_alike_the_first_of_the_source_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_looks(tmp_path)
    main(config(source, tmp_path / "c", **NEAR))
    manifest, keys = kept(tmp_path / "c")
    assert keys == [str(k) for k in range(8)]
    assert (manifest.samples, manifest.excluded) == (8, 10)
    assert all(unit.rejected == {} and unit.accepted == 6 for unit in manifest.units)
    assert manifest.contract.filters["near_duplicates"] == 4
    assert manifest.contract.versions["perceptual_hash"] == "phash 1"
    assert "10 near-duplicates of earlier ones" in capsys.readouterr().out
    assert "near-duplicates of earlier records" in (tmp_path / "c/card.html").read_text("utf-8")
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, min_psnr=0.0)) == 0


def test_which_stay_does_not_depend_on_workers_or_on_growth(tmp_path: Path) -> None:
    source = write_looks(tmp_path)
    main(config(source, tmp_path / "one", **NEAR))
    main(config(source, tmp_path / "three", decode_in="processes", workers=3, **NEAR))
    assert files(tmp_path / "one") == files(tmp_path / "three")
    for number in range(3):
        main(config(str(tmp_path / f"{number}.tar"), tmp_path / "grown", **NEAR))
        manifest, keys = kept(tmp_path / "grown")
        assert keys == [str(k) for k in range(8)][: 6 * number + 6]
        assert manifest.version == number + 1
    assert load_excluded(open_storage(str(tmp_path / "grown")), manifest).tolist() == [
        *([1, row] for row in range(2, 6)),
        *([2, row] for row in range(6)),
    ]


def test_equal_files_and_near_ones_are_told_apart_and_both_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_looks(tmp_path)
    (tmp_path / "3.tar").write_bytes((tmp_path / "0.tar").read_bytes())
    filters = FiltersConfig(near_duplicates=4, duplicates="image")
    main(config(str(tmp_path / "{0..3}.tar"), tmp_path / "c", **NEAR | {"filters": filters, "flip": True}))
    manifest, keys = kept(tmp_path / "c")
    assert keys == [str(k) for k in range(8) for _ in range(2)]
    assert manifest.excluded == 2 * 16
    assert "12 repeated in other shards, 20 near-duplicates of earlier ones" in capsys.readouterr().out


def test_each_resolution_is_the_dataset_that_it_alone_would_have_been(tmp_path: Path) -> None:
    source = write_looks(tmp_path)
    main(config(source, tmp_path / "both", resolution=(32, 64), buckets=16, **NEAR))
    for side in (32, 64):
        main(config(source, tmp_path / str(side), resolution=(side,), buckets=16, **NEAR))
        assert files(tmp_path / "both" / str(side)) == files(tmp_path / str(side))


def test_damaged_hashes_are_found(tmp_path: Path) -> None:
    source = write_looks(tmp_path)
    main(config(source, tmp_path / "c", **NEAR))
    whole = (tmp_path / "c/units/000001.hashes.npy").read_bytes()
    for damaged in (whole[:-1] + b"x", whole[:100], b""):
        (tmp_path / "c/units/000001.hashes.npy").write_bytes(damaged)
        with pytest.raises(DataError, match=r"000001\.hashes\.npy is damaged: .*forget=\[1\.tar\]"):
            main(config(source, tmp_path / "c", finalize=True, **NEAR))


def test_a_contract_of_other_numbers_of_bits_is_refused_in_one_line(tmp_path: Path) -> None:
    main(config(write_looks(tmp_path), tmp_path / "c", **NEAR))
    storage = open_storage(str(tmp_path / "c"))
    plan = read_plan(storage)
    assert plan is not None
    for bits in (-1, 5):
        filters = plan.contract.filters | {"near_duplicates": bits}
        other = dataclasses.replace(plan, contract=dataclasses.replace(plan.contract, filters=filters))
        with pytest.raises(DataError, match=f"near_duplicates={bits}, and 0 to 4 are known"):
            find_excluded(storage, other, [])


@pytest.mark.parametrize("bits", [-1, 5, 64])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=r"filters\.near_duplicates=.* from 0 to 4"):
        check(config("s", "c", filters=FiltersConfig(near_duplicates=bits)))


def test_a_contract_without_the_new_filters_is_that_of_before() -> None:
    every = dataclasses.asdict(FiltersConfig())
    assert set(every) - set(stored_filters(FiltersConfig())) == {"near_duplicates", "clip_score"}
    asked = stored_filters(FiltersConfig(near_duplicates=2, clip_score=20.0))
    assert (asked["near_duplicates"], asked["clip_score"]) == (2, 20.0)
