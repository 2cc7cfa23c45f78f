"""The bytes of a cache, before it is made, against those of a real one: for every condition, way of keeping captions
and kind of stored image. Encoders have the shipped architecture with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made.captioned import write_captioned
from made.encode import ENCODERS, config, files, write_sized
from made.first_stages import VQ
from pipeline.config import EncodeConfig, EncodersConfig, FiltersConfig
from pipeline.config.conditions import BoxesConfig, ClassesConfig, LabelsConfig, LowresConfig, MaskConfig
from pipeline.data.format.contract import plain
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError
from pipeline.models.encoders.tokenizer import load_tokenizer
from pipeline.planning.cached.encoders import stage_facts, tower_facts
from pipeline.planning.cached.facts import contracts_of
from pipeline.planning.cached.plan import PlannedEncode, plan_encode
from pipeline.planning.cached.records import Sampled, record_bytes
from pipeline.planning.cached.size import CacheSize, cache_bytes, of_manifest
from pipeline.planning.cached.work import encode_figures, encode_requests
from pipeline.planning.plan.figures import Rate
from pipeline.storage.urls import open_storage
from preprocess.encode import main
from preprocess.shapes.shards import write_shards

IMAGES, SHARDS = 24, 2
SEVERAL = {"caption_key": ("txt", "json:long", "json:alternatives"), "captions_most": 5}
EVERYTHING = {
    "text_storage": "none",
    "flip": True,
    "conditions": ("class", "boxes", "labels", "lowres", "mask", "pixels"),
    "lowres": LowresConfig(degradation="bsr", variants=2),
    "mask": MaskConfig(variants=3, convention="ldm"),
}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "trimmed, random crops": {"text_storage": "trimmed", "crop": "random"},
    "tokens": {"text_storage": "tokens", "flip": True},
    "every condition": EVERYTHING,
    "several captions: tokens": SEVERAL,
    "several captions: full": {**SEVERAL, "text_storage": "full"},
    "several captions: trimmed": {**SEVERAL, "text_storage": "trimmed"},
    "latents of a VQ model": {"text_storage": "none"},
    "pixels": {"stored": "pixels"},
    "pixels as PNGs, with captions": {"stored": "pixels", "pixels": "png", "flip": True, "caption_key": ("txt",)},
    "buckets": {"buckets": 16, "text_storage": "tokens"},
    "two resolutions": {"resolution": (32, 64)},
    "hashes of duplicates": {"filters": FiltersConfig(duplicates="image", near_duplicates=1), "text_storage": "tokens"},
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_shards(str(folder), IMAGES, 0, "train", shard_size=IMAGES // SHARDS, classes=True)
    return folder


def settings(case: str, shapes: Path, folder: Path) -> EncodeConfig:
    """The configuration of a case, with a source of its own where it needs one."""
    changes, source = dict(CASES[case]), f"{shapes}/{{00000..00001}}.tar"
    if "caption_key" in changes and len(changes["caption_key"]) > 1:
        source = write_captioned(folder / "in" / "0.tar", IMAGES)
    elif case == "buckets":
        (folder / "in").mkdir()
        sizes = [(64, 64), (90, 40), (40, 90), (80, 64)] * (IMAGES // 8)
        write_sized(folder / "in" / "0.tar", sizes)
        write_sized(folder / "in" / "1.tar", sizes, len(sizes))
        source = str(folder / "in" / "*.tar")
    elif case.startswith("latents"):
        (folder / "vq").mkdir()
        described = {**VQ, "_class_name": "VQModel", "vq_embed_dim": 5}
        (folder / "vq" / "config.json").write_text(json.dumps(described))
        changes["encoders"] = EncodersConfig(vae=str(folder / "vq"), seed=1)
    elif case == "every condition":
        changes |= {
            "classes": ClassesConfig(names=str(shapes / "classes.txt")),
            "boxes": BoxesConfig(names=str(shapes / "labels.txt"), most=7),
            "labels": LabelsConfig(names=str(shapes / "labels.txt"), grid=2),
        }
    return config(source, folder / "cache", **changes)


def planned(made: EncodeConfig, shards: int = SHARDS) -> PlannedEncode:
    """What is planned of a source that is read whole, with the tower's own tokenizer."""
    tokenizer = load_tokenizer(made.encoders)
    return plan_encode(made, shards=shards, tokens=lambda text: tokenizer.ids(text)[1])


def of_kind(stored: dict[str, bytes], ending: str) -> int:
    return sum(len(data) for name, data in stored.items() if name.endswith(ending))


@pytest.mark.parametrize("case", CASES)
def test_bytes_of_a_planned_cache_are_those_of_the_real_one(case: str, shapes: Path, tmp_path: Path) -> None:
    made = settings(case, shapes, tmp_path)
    plan = planned(made)
    assert main(made) == 0
    assert plan.images == IMAGES and plan.source is not None and not plan.source.rejected
    for side, cache in zip(made.resolution, plan.caches, strict=True):
        folder = tmp_path / "cache" / ("" if len(made.resolution) == 1 else str(side))
        stored, size = files(folder), cache.size
        manifest = load_manifest(open_storage(str(folder)))
        assert plain(cache.contract)["members"] == plain(manifest.contract)["members"]
        assert size.records == manifest.samples == IMAGES * (1 + made.flip)
        assert size.tars == len(manifest.shards) and size.objects == len(stored)
        assert size.tar_bytes == pytest.approx(of_kind(stored, ".tar"), rel=2e-3)
        few = 2e-2 if case == "buckets" else 5e-3  # three records in each of these tars
        assert size.bytes_beside["indexes"] == pytest.approx(of_kind(stored, ".index.json"), rel=few)
        assert size.bytes_beside["uncond"] == len(stored.get("uncond.npy", b""))
        assert size.bytes_beside["plan"] == pytest.approx(len(stored["contract.json"]), rel=0.01)
        assert size.bytes_beside["manifest"] == pytest.approx(2 * len(stored["manifest.json"]), rel=0.02)
        reports = sum(len(stored[f"units/{unit:06d}.json"]) for unit in range(len(manifest.units)))
        assert size.bytes_beside["reports"] == pytest.approx(reports, rel=0.05)
        assert size.bytes_beside["hashes"] == of_kind(stored, ".hashes.npy")
        assert size.bytes_beside["card"] == pytest.approx(len(stored["card.html"]), rel=0.1)
        said = of_manifest(manifest)
        assert said.tar_bytes == of_kind(stored, ".tar") and said.objects == len(stored)
        assert said.bytes_beside["indexes"] == pytest.approx(of_kind(stored, ".index.json"), rel=1e-2)


def test_bytes_of_members_are_those_that_the_reports_count(shapes: Path, tmp_path: Path) -> None:
    """By member, without headers and padding, which add 512 to 1,023 bytes each."""
    made = settings("every condition", shapes, tmp_path)
    plan = planned(made)
    main(made)
    counted: dict[str, int] = {}
    for unit in range(SHARDS):
        report = json.loads((tmp_path / f"cache/units/{unit:06d}.json").read_text())
        for name, count in report["member_bytes"].items():
            counted[name] = counted.get(name, 0) + count
    size = plan.caches[0].size
    assert size.bytes_by_member.keys() == counted.keys()
    for name, count in size.bytes_by_member.items():
        assert 512 * size.records <= count - counted[name] < 1024 * size.records


def test_the_whole_destination_is_planned_within_a_hundredth(shapes: Path, tmp_path: Path) -> None:
    """Pages and reports too, of a cache that is large enough for them to be small beside the records."""
    write_shards(str(tmp_path / "in"), 160, 0, "train", shard_size=80)
    made = config(f"{tmp_path}/in/{{00000..00001}}.tar", tmp_path / "cache", batch=16)
    plan = planned(made)
    main(made)
    stored = files(tmp_path / "cache")
    assert plan.caches[0].size.total == pytest.approx(sum(map(len, stored.values())), rel=0.01)
    tokens, full = (plan.caches[0].by_text[kind].total for kind in ("tokens", "full"))
    assert full == plan.caches[0].size.total and tokens < 0.5 * full


def test_a_trial_of_one_shard_stands_for_the_others(shapes: Path, tmp_path: Path) -> None:
    made = config(f"{shapes}/{{00000..00001}}.tar", tmp_path / "cache")
    whole, part = (planned(made, shards) for shards in (2, 1))
    assert whole.source is not None and part.source is not None
    assert (whole.source.tried, part.source.tried) == (2, 1)
    assert part.images == pytest.approx(IMAGES, abs=2) and whole.images == IMAGES
    assert sum(whole.source.unit_rows) == IMAGES and whole.source.unit_rows == pytest.approx((12, 12), abs=1)
    assert part.caches[0].size.tar_bytes == pytest.approx(whole.caches[0].size.tar_bytes, rel=0.1)
    scaled = plan_encode(made, images=10_000, shards=1)
    assert scaled.images == sum(scaled.unit_rows) == 10_000  # type: ignore[arg-type]


def test_without_a_source_every_sample_is_like_the_assumed_one() -> None:
    made = EncodeConfig(source="", dest="d", encoders=sd1(), resolution=(512,))
    size = plan_encode(made, images=1_000_000).caches[0].size
    # 8 x 64 x 64 and 77 x 768 of two bytes, each with a head of 128 and 512 bytes; a json that fits a block
    assert size.bytes_by_member == {
        "json": 1024 * 10**6,
        "moments": (512 + 65_536 + 512) * 10**6,
        "text": (512 + 118_272 + 512) * 10**6,
    }
    assert (size.tars, size.objects) == (100, 305)
    with pytest.raises(ConfigError, match="give images=N"):
        plan_encode(made)


def test_shapes_of_stable_diffusions_arrays_are_known_without_its_weights() -> None:
    stage, tower = stage_facts(sd1()), tower_facts(sd1())
    assert (stage.channels, stage.downsampling, stage.stored) == (4, 8, "moments")
    assert (tower.width, tower.vocabulary) == (768, 49_408)
    assert tower_facts(replace(sd1(), text="ViT-H-14")).width == 1024
    with pytest.raises(ConfigError, match="neither demo"):
        tower_facts(replace(sd1(), text="../ViT"))
    with pytest.raises(ConfigError, match="no multiple of the autoencoder's 8"):
        contracts_of(EncodeConfig(source="", dest="", encoders=sd1(), resolution=(500,)))


def sd1() -> EncodersConfig:
    return EncodersConfig(
        name="sd1", vae="stabilityai/sd-vae-ft-mse", text="ViT-L-14", text_pretrained="openai", text_length=77
    )


def test_a_json_takes_a_block_more_when_its_caption_does_not_fit() -> None:
    contract = contracts_of(EncodeConfig(source="", dest="", encoders=ENCODERS))[0]
    short, long = (record_bytes(contract, Sampled(captions=("a" * n,))).members["json"] for n in (60, 500))
    assert (short, long) == (1024, 1536)


def test_requests_and_hours_follow_from_shards_and_rates() -> None:
    size = CacheSize(1_000_000, 1_000_000, {"moments": 10**11}, {"ends": 0}, tars=100, objects=305)
    asked = encode_requests(size, [10**9] * 100, processes=8, hours=10)
    assert asked.get == 100 * 120 + 100 + 4 * 8  # ranges of 8 MiB
    assert asked.put == 100 + 8 * 10 * 3600 // 30 + 100 * (2 + 60 + 1) + 100 + 4  # renewals, and parts of 16 MiB
    rate = Rate(100.0, "images/s", "measured", "a machine")
    hours = encode_figures(1_000_000, rate, (1, 8), source_bytes=10**11)
    assert [round(one.value, 3) for one in hours if one.unit == "hours"] == [2.778, 0.347]
    assert {one.basis for one in hours} == {"measured"}


def test_a_billion_images_are_planned_at_once() -> None:
    contract = contracts_of(EncodeConfig(source="", dest="", encoders=sd1(), resolution=(256,)))[0]
    size = cache_bytes(10**9, contract, 10_000)
    assert size.tars == 100_000 and size.total > 10**14
