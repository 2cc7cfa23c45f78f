"""encode and verify with conditions: a cache of every condition at once, without captions.

Encoders have the shipped architecture with random weights.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made.encode import ENCODERS, config, files, png, write_tar
from pipeline.conditions.mask import hide, unpack
from pipeline.config import EncodeConfig, VerifyConfig
from pipeline.config.conditions import BoxesConfig, ClassesConfig, LabelsConfig, LowresConfig, MaskConfig
from pipeline.config.loading.load import load
from pipeline.data.format.contract import TextFacts
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.members import arrays_of
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, DataError, DestinationExists, SourceError
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import NetworkStage
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.encoding import encoder
from preprocess.encoding.encoder import to_unit_range
from preprocess.encoding.estimate import estimate
from preprocess.shapes.captions import CLASS_NAMES
from preprocess.shapes.drawing import label_map, render, scene
from preprocess.shapes.shards import write_shards

IMAGES = 6


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_shards(str(folder), IMAGES, 0, "train", shard_size=4, classes=True)
    return folder


def everything(shapes: Path, dest: Path, **changes: Any) -> EncodeConfig:
    """The configuration of a cache with every condition and without captions."""
    settings: dict[str, Any] = {
        "text_storage": "none",
        "conditions": ("class", "boxes", "labels", "lowres", "mask", "pixels"),
        "classes": ClassesConfig(names=str(shapes / "classes.txt")),
        "boxes": BoxesConfig(names=str(shapes / "labels.txt"), most=1),
        "labels": LabelsConfig(names=str(shapes / "labels.txt")),
        "lowres": LowresConfig(degradation="bsr", variants=2),
        "mask": MaskConfig(variants=3, convention="ldm"),
        "flip": True,
    }
    source = changes.pop("source", f"{shapes}/{{00000..00001}}.tar")
    return config(source, dest, **{**settings, **changes})


@pytest.fixture(scope="module")
def cache(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("cache") / "c"
    assert main(everything(shapes, dest)) == 0
    return dest


def manifest_of(cache: Path) -> Manifest:
    return load_manifest(open_storage(str(cache)))


def test_a_record_has_every_condition_as_its_facts_say(cache: Path) -> None:
    manifest = manifest_of(cache)
    contract, facts = manifest.contract, manifest.contract.conditions
    assert (contract.text, contract.text_sha256, contract.caption_key, manifest.uncond_sha256) == (None, "", "", "")
    assert contract.members == arrays_of(contract)
    assert facts.classes is not None and facts.classes.names == CLASS_NAMES
    assert facts.mask is not None and (facts.mask.hole, facts.mask.order, facts.mask.low) == (
        "black",
        "masked_mask",
        -1,
    )
    stage = load_autoencoder(ENCODERS)
    records = list(first_records(open_storage(str(cache)), manifest, 99))
    assert len(records) == 2 * IMAGES
    for i, record in enumerate(records):
        truth, members, flipped = scene(0, i // 2), record.members, i % 2
        step = -1 if flipped else 1
        pixels = np.ascontiguousarray(render(truth)[:, ::step])
        assert (members["pixels"].transpose(1, 2, 0) == pixels).all()
        assert members["cond.class"] == truth.number
        assert (members["cond.labels"] == label_map(truth)[:, ::step][1::2, 1::2]).all()
        assert set(members["cond.boxes"][:, 0].tolist()) <= {-1, *(thing.label for thing in truth.objects)}
        holes = unpack(members["cond.mask"], 64)
        hidden = torch.from_numpy(np.stack([hide(pixels, hole, "black") for hole in holes])).permute(0, 3, 1, 2)
        means = stage.encode(hidden)[:, :4].numpy()
        np.testing.assert_allclose(members["cond.masked"], means, atol=2e-3, rtol=2e-3)


def test_the_hole_that_is_encoded_is_the_one_that_sampling_hides() -> None:
    """On the device, as in pipeline/conditions: to the bit."""
    pixels, hole = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), np.eye(8, dtype=np.uint8)
    images = to_unit_range(torch.from_numpy(pixels)[None])
    for colour, value in (("grey", 0.0), ("black", -1.0)):
        filled = images.masked_fill(torch.from_numpy(hole > 0), value)[0].permute(1, 2, 0).numpy()
        assert (filled == hide(pixels, hole, colour)).all()  # type: ignore[arg-type]


def test_boxes_that_are_cut_and_classes_are_counted_in_reports_and_on_the_card(
    shapes: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = [scene(0, i) for i in range(IMAGES)]
    reports = [json.loads((cache / f"units/00000{n}.json").read_text()) for n in range(2)]
    cut = sum(len(one.objects) - 1 for one in scenes)
    assert sum(report["cut_boxes"] for report in reports) == cut > 0
    counted: dict[str, int] = {}
    for report in reports:
        for number, count in report["census"]["classes"].items():
            counted[number] = counted.get(number, 0) + count
    numbers = [str(one.number) for one in scenes]
    assert counted == {number: numbers.count(number) for number in numbers}
    assert main(everything(shapes, cache)) == 0
    assert f"(rejected: none; {cut} boxes left out)" in capsys.readouterr().out
    card = (cache / "card.html").read_text()
    assert f"boxes left out: beyond the 1 largest of a crop</td><td>{cut}<" in card.replace(' class="text"', "")
    assert f"{scenes[0].number}: {CLASS_NAMES[scenes[0].number]}" in card
    assert f'<span class="clamp">{CLASS_NAMES[scenes[0].number]}</span>' in card  # for want of a caption
    assert f"{len(counted)} of 24 occur" in card


def test_a_report_of_a_cache_without_conditions_has_the_fields_of_before(shapes: Path, tmp_path: Path) -> None:
    main(config(f"{shapes}/00001.tar", tmp_path / "c"))
    report = json.loads((tmp_path / "c/units/000000.json").read_text())
    assert "cut_boxes" not in report and "classes" not in report["census"]


def test_worker_processes_and_threads_make_the_same_bytes(shapes: Path, cache: Path, tmp_path: Path) -> None:
    main(everything(shapes, tmp_path / "c", decode_in="processes", workers=1))
    assert files(tmp_path / "c") == files(cache)


def test_another_recipe_of_a_condition_is_refused_with_the_difference(shapes: Path, cache: Path) -> None:
    held = files(cache)
    for changes, words in (
        ({"lowres": LowresConfig(degradation="box")}, r"conditions\.lowres\.degradation: bsr, not box"),
        ({"mask": MaskConfig(variants=3)}, r"conditions\.mask\.hole: black, not grey"),
        ({"boxes": BoxesConfig(count=25, most=3)}, r"conditions\.boxes\.most: 1, not 3"),
    ):
        with pytest.raises(DestinationExists, match=words):
            main(everything(shapes, cache, **changes))
    assert files(cache) == held


def test_an_estimate_takes_conditions_and_no_captions_into_account(shapes: Path, tmp_path: Path) -> None:
    told = estimate(everything(shapes, tmp_path / "none", dry_run=True))
    bare = estimate(everything(shapes, tmp_path / "none", dry_run=True, conditions=(), **BARE))
    assert "* none" in told and "full" not in told
    sizes = [float(text.split("none ")[1].split()[0].replace(",", "")) for text in (told, bare)]
    assert sizes[0] > 2 * sizes[1] + 64 * 64 * 3
    assert not (tmp_path / "none").exists()


BARE: dict[str, Any] = {
    "classes": ClassesConfig(),
    "boxes": BoxesConfig(),
    "labels": LabelsConfig(),
    "lowres": LowresConfig(),
    "mask": MaskConfig(),
}
"""Groups of keys as they are by default."""


def test_every_bad_condition_is_counted_and_the_others_are_taken(tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.uint8)
    image, whole = png(), {"cls": b"1", "json": b'{"boxes": []}', "labels.png": gray(labels)}
    bad: dict[str, dict[str, bytes | None]] = {
        "class_missing": {"cls": None},
        "class_out_of_range": {"cls": b"2"},
        "class_unreadable": {"cls": b"cat"},
        "boxes_outside": {"json": b'{"boxes": [[0, 0, 0, 2, 1]]}'},
        "boxes_inverted": {"json": b'{"boxes": [[0, 1, 0, 0, 1]]}'},
        "box_class_out_of_range": {"json": b'{"boxes": [[9, 0, 0, 1, 1]]}'},
        "label_out_of_range": {"labels.png": gray(labels + 7)},
        "labels_size": {"labels.png": gray(labels[1:])},
        "labels_unreadable": {"labels.png": gray(labels.astype(np.uint16))},
        "image_missing": {"png": None},
    }
    members = []
    for key, changes in [("whole", {}), *bad.items()]:
        found: dict[str, bytes | None] = {"png": image, **whole, **changes}
        members += [(f"{key}.{suffix}", data) for suffix, data in found.items() if data is not None]
    write_tar(tmp_path / "0.tar", members)
    groups = {"classes": ClassesConfig(count=2), "boxes": BoxesConfig(count=9), "labels": LabelsConfig(count=7)}
    asked = ("class", "boxes", "labels")
    source, dest = str(tmp_path / "0.tar"), tmp_path / "c"
    main(config(source, dest, text_storage="none", conditions=asked, max_rejects=1.0, **groups))
    unit = manifest_of(dest).units[0]
    assert unit.rejected == dict.fromkeys(bad, 1)
    assert (unit.read, unit.accepted) == (len(bad) + 1, 1)


def gray(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# verify


def checked(shapes: Path, cache: Path) -> int:
    source = f"{shapes}/{{00000..00001}}.tar"
    return verify.main(VerifyConfig(dataset=str(cache), source=source, min_psnr=-100, encoders=ENCODERS))


def test_verify_makes_every_condition_again(shapes: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(shapes, cache) == 0
    told = " ".join(capsys.readouterr().out.split())
    names = "cond.boxes, cond.class, cond.labels, cond.lowres, cond.mask, pixels"
    assert f"conditions made again, equal to the bit: {names}" in told
    assert "cond.masked encoded again within" in told
    assert "empty caption" not in told and "captions" not in told


@pytest.mark.parametrize("name", ["class", "boxes", "labels", "lowres", "mask", "pixels", "masked"])
def test_verify_finds_a_condition_that_is_not_its_sources(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Encode makes one condition wrongly: of another record, or by another recipe than the contract says."""
    if name == "masked":
        monkeypatch.setattr("preprocess.encoding.encoder.HOLES", {"black": 1.0})
    else:
        stored = name if name == "pixels" else f"cond.{name}"
        take = encoder.Item.take

        def taken_wrongly(item: encoder.Item, *holes: Any) -> None:
            take(item, *holes)
            changed = item.arrays[stored].copy()
            changed[...] = np.roll(changed, 1) if changed.ndim and name != "boxes" else changed + 1
            item.arrays[stored] = changed

        monkeypatch.setattr("preprocess.encoding.encoder.Item.take", taken_wrongly)
    dest = tmp_path / "c"
    main(everything(shapes, dest, flip=False))
    monkeypatch.undo()
    with pytest.raises(DataError, match=stored if name != "masked" else "cond.masked"):
        checked(shapes, dest)


# --------------------------------------------------------------------------------------------------------------------
# Captions, and their facts


def test_token_ids_come_with_the_size_and_the_start_of_their_vocabulary(shapes: Path, tmp_path: Path) -> None:
    tower = load_text(ENCODERS)
    for storage, known in (("tokens", (tower.vocabulary, tower.tokenizer.sot)), ("full", (0, -1))):
        dest = tmp_path / storage
        main(config(f"{shapes}/00001.tar", dest, text_storage=storage))
        facts = manifest_of(dest).contract.text
        assert isinstance(facts, TextFacts) and (facts.vocabulary, facts.start) == known
    first = next(first_records(open_storage(str(tmp_path / "tokens")), manifest_of(tmp_path / "tokens"), 1))
    assert first.members["tokens"][0] == tower.start
    assert first.members["tokens"].max() < tower.vocabulary


def test_no_tower_and_no_tokenizer_are_loaded_without_captions(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("preprocess.encode.load_text", "preprocess.source.decoders.load_tokenizer"):
        monkeypatch.setattr(place, None)
    source = f"{shapes}/00001.tar"
    assert main(config(source, tmp_path / "c", text_storage="none", caption_key=())) == 0
    assert main(config(source, tmp_path / "c", text_storage="none")) == 0  # the same contract
    assert not (tmp_path / "c/uncond.npy").exists()


# --------------------------------------------------------------------------------------------------------------------
# What contradicts itself is refused before anything is loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conditions=[class]"], "classes.count=0 and classes.names is empty"),
        (["conditions=[boxes]"], "boxes.count=0 and boxes.names is empty: give one of them"),
        (["conditions=[labels]"], "labels.count=0 and labels.names is empty"),
        (["classes.count=3"], "classes.* is given, but conditions=[] has no class: add it"),
        (["conditions=[mask]", "lowres.factor=2"], "lowres.* is given, but conditions=[mask] has no lowres"),
        (["conditions=[class,class]", "classes.count=3"], "one of them is given twice"),
        (["conditions=[class]", "classes.count=3", "classes.key=json:"], "classes.key=json:: cls, or json:KEY"),
        (["conditions=[mask]", "mask.kinds=[]"], "mask.kinds=[]: one or more is wanted"),
        (
            ["conditions=[mask]", "mask.kinds=[thin,thin]"],
            "one of them is given twice, and all have equal chances: giv",
        ),
        (
            ["conditions=[mask]", "mask.kinds=[file]", "mask.variants=2"],
            "nothing is drawn, so all would be equal; leave",
        ),
        (
            ["conditions=[mask]", "mask.kinds=[all]", "mask.variants=3"],
            "mask.variants=3 with mask.kinds=[all]: nothing",
        ),
        (["conditions=[lowres]", "lowres.variants=2"], "all would be equal"),
        (["text_storage=none", "caption_key=json:caption"], "no caption is read, so leave caption_key out"),
        (["text_storage=none", "filters.min_caption=2"], "no caption is read, so leave it out"),
        (["text_storage=none", "filters.duplicates=pair"], "give image, or keep"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("encode", ["source=a.tar", "dest=b", *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_do_not_fit_are_refused_before_any_process_starts(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.encode.run_ranks", None)
    names = str(shapes / "classes.txt")
    for classes, words in (
        (ClassesConfig(names=names, count=23), r"classes\.count=23, but .*classes\.txt has 24 names"),
        (ClassesConfig(names=str(tmp_path / "none.txt")), r"classes\.names=.*none\.txt: there is no such file"),
        (ClassesConfig(names=str(shapes / "00000.tar")), r"classes\.names: .*00000\.tar: "),
    ):
        with pytest.raises(ConfigError, match=words):
            main(config("a.tar", tmp_path / "c", conditions=("class",), classes=classes))


def test_a_factor_that_does_not_divide_the_crop_is_refused(shapes: Path, tmp_path: Path) -> None:
    lowres = LowresConfig(factor=3)
    with pytest.raises(ConfigError, match=r"lowres\.factor=3: resolution=64 is not a multiple of it"):
        main(config(f"{shapes}/00001.tar", tmp_path / "c", conditions=("lowres",), lowres=lowres))


def test_a_latent_of_a_crop_with_a_hole_that_is_not_finite_names_the_sample(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = NetworkStage.encode, []

    def broken(self: NetworkStage, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        moments = real(self, x)
        if len(calls) % 2 == 0:
            moments[0, 0, 0, 0] = float("inf")
        return moments

    monkeypatch.setattr(NetworkStage, "encode", broken)
    with pytest.raises(Exception, match=r"cond\.masked of sample 00001\d+ in "):
        main(config(f"{shapes}/00001.tar", tmp_path / "c", conditions=("mask",)))


def test_conditions_of_every_bucket_flip_and_random_crop_are_made_again(tmp_path: Path) -> None:
    members, rng = [], np.random.default_rng(0)
    sizes = [(64, 64), (70, 64), (64, 90), (128, 64), (40, 100)]
    for number, (width, height) in enumerate(sizes):
        labels = rng.integers(0, 5, (height, width), dtype=np.uint8)
        boxes = [[k, *low, *(low + 0.3)] for k, low in enumerate(rng.random((3, 2)) * 0.7)]
        members += [
            (f"{number}.cls", b"%d" % number),
            (f"{number}.json", json.dumps({"boxes": boxes}).encode()),
            (f"{number}.labels.png", gray(labels)),
            (f"{number}.mask.png", gray(labels * 60)),
            (f"{number}.png", png((width, height), number)),
        ]
    write_tar(tmp_path / "0.tar", members)
    source, dest = str(tmp_path / "0.tar"), tmp_path / "c"
    settings = everything(
        tmp_path,
        dest,
        source=source,
        buckets=16,
        crop="random",
        text_storage="full",
        caption_key=("json:words",),
        classes=ClassesConfig(count=5),
        boxes=BoxesConfig(count=3),
        labels=LabelsConfig(count=5, grid=2),
        mask=MaskConfig(kinds=("file", "medium"), variants=2),
    )
    with pytest.raises(SourceError, match="5 read, rejected: 5 caption_missing"):
        main(replace(settings, dest=str(tmp_path / "none")))
    main(replace(settings, text_storage="none", caption_key=("txt",)))
    manifest = manifest_of(dest)
    assert len({entry.size for entry in manifest.shards}) > 2 and manifest.samples == 2 * len(sizes)
    for record in first_records(open_storage(str(dest)), manifest, 99):
        _, height, width = record.members["moments"].shape
        assert record.members["cond.labels"].shape == (2 * height, 2 * width)
        assert record.members["cond.mask"].shape == (2, 8 * height, width)
        assert record.members["cond.masked"].shape == (2, 4, height, width)
    found = VerifyConfig(dataset=str(dest), source=source, min_psnr=-100, encoders=ENCODERS)
    assert verify.main(found) == 0
