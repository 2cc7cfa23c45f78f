"""filters.clip_score: samples whose pictures and captions do not fit are rejected, whatever they are scored with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made.encode import ENCODERS, config, files, write_tar
from made.hostile import encoded
from pipeline.config import EncodeConfig, EncodersConfig, FiltersConfig, VerifyConfig
from pipeline.config.check.verbs import check
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.measure import clip_scores
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.encoding.estimate import estimate
from preprocess.filters import clip
from preprocess.filters.clip import REASON, ClipFilter, require_transform
from preprocess.shapes.drawing import render, scene
from preprocess.source.recipe import recipe_of
from preprocess.source.rejected import Rejected
from preprocess.source.sample import Prepared, prepare, whole_picture
from preprocess.source.shard import Sample

DEMO = EncodersConfig()
LEAST = 30.0


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.set_num_threads(1)
    return load_text(DEMO)


def pictures(count: int) -> list[tuple[bytes, str]]:
    """Pictures of captioned shapes; every third has the caption of another."""
    scenes = [scene(0, i, "train", single=True) for i in range(count + 7)]
    return [
        (encoded(Image.fromarray(np.asarray(render(scenes[i]))), "PNG"), scenes[i + 7 * (i % 3 == 2)].caption)
        for i in range(count)
    ]


def shard(path: Path, count: int = 24) -> str:
    members = []
    for i, (picture, caption) in enumerate(pictures(count)):
        members += [(f"{i}.png", picture), (f"{i}.txt", caption.encode())]
    write_tar(path, members)
    return str(path)


def scored(source: str, dest: Path | str, **changes: Any) -> EncodeConfig:
    fields: dict[str, Any] = {"stored": "pixels", "caption_key": ("txt",), "text_storage": "tokens", "encoders": DEMO}
    return config(source, dest, **fields | {"filters": FiltersConfig(clip_score=LEAST)} | changes)


def prepared(count: int) -> list[Prepared]:
    recipe = recipe_of(scored("", ""))
    ids = load_text(DEMO).ids
    members = [{"png": picture, "txt": caption.encode()} for picture, caption in pictures(count)]
    return [prepare(Sample(str(i), one), recipe, ids) for i, one in enumerate(members)]


def test_scores_are_those_of_open_clips_own_transform(tower: TextTower) -> None:
    samples = prepared(12)
    images = np.stack([np.asarray(sample.pictures[0].pixels) for sample in samples])
    wanted = clip_scores(tower, images, [sample.caption for sample in samples])
    found = ClipFilter(tower, LEAST, 4).scores(samples)
    assert np.abs(np.array(found) - wanted.numpy()).max() < 0.01
    assert wanted.max() - wanted.min() > 10


@pytest.mark.parametrize("size", [(64, 64), (300, 300), (640, 480), (31, 97), (1, 5000)])
def test_the_picture_that_is_scored_is_open_clips(size: tuple[int, int]) -> None:
    open_clip = pytest.importorskip("open_clip")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    found = whole_picture(image, (64, 64)).astype(int)
    assert found.shape == (64, 64, 3)
    if max(size) < 1000:
        facts = open_clip.transform.PreprocessCfg(size=64, mean=(0, 0, 0), std=(1, 1, 1))
        theirs = open_clip.transform.image_transform_v2(facts, is_train=False)(image)
        wanted = (theirs.permute(1, 2, 0) * 255).round().int().numpy()
        assert np.abs(found - wanted).mean() < (0.01 if size[0] == size[1] else 6)


def test_samples_whose_captions_do_not_fit_are_rejected_and_counted(tmp_path: Path, tower: TextTower) -> None:
    source = shard(tmp_path / "0.tar")
    main(scored(source, tmp_path / "c", max_rejects=0.0))
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    scores = ClipFilter(tower, LEAST, 1).scores(prepared(24))
    fitting = [str(i) for i, score in enumerate(scores) if score >= LEAST]
    assert 8 <= len(fitting) <= 20
    assert [record.meta["key"] for record in first_records(storage, manifest, 99)] == fitting
    assert manifest.units[0].rejected == {REASON: 24 - len(fitting)}
    assert manifest.contract.clip_sha256 == tower.image_sha256
    first = json.loads(storage.get("units/000000.rejected.jsonl").splitlines()[0])
    assert first["reason"] == REASON and first["message"].endswith(f", filters.clip_score={LEAST:g}")
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, min_psnr=0.0)) == 0


def test_workers_and_batches_change_nothing_about_who_is_rejected(tmp_path: Path) -> None:
    source = shard(tmp_path / "0.tar")
    main(scored(source, tmp_path / "threads"))
    main(scored(source, tmp_path / "processes", decode_in="processes", workers=3))
    assert files(tmp_path / "threads") == files(tmp_path / "processes")
    found = {}
    for batch in (1, 5, 64):
        main(scored(source, tmp_path / str(batch), batch=batch))
        found[batch] = (tmp_path / str(batch) / "000000.tar").read_bytes()
    assert len(set(found.values())) == 1


def test_a_score_at_the_limit_is_computed_by_itself(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the others of its batch are, and whatever they do to its last bits."""
    samples = prepared(6)
    alone = ClipFilter(tower, LEAST, 6).scores(samples[:1])[0]
    noisy, sizes = ClipFilter(tower, alone, 6), list[int]()
    real = noisy.scores

    def scores(group: list[Prepared]) -> list[float]:
        sizes.append(len(group))
        return [score - (0.05 if len(group) > 1 else 0) for score in real(group)]

    monkeypatch.setattr(noisy, "scores", scores)
    assert not isinstance(next(iter(noisy.judged(samples))), Rejected)
    assert sizes[:2] == [6, 1]


def test_rejections_pass_through_in_their_places(tower: TextTower) -> None:
    samples = prepared(4)
    bad = Rejected("x", "image_truncated")
    results = list(ClipFilter(tower, 1.0, 8).judged([bad, samples[0], bad, samples[1]]))
    assert results[0] is bad and results[2] is bad and results[1] is samples[0]
    assert samples[0].whole is None
    assert list(ClipFilter(tower, 1.0, 8).judged([bad])) == [bad]


def test_a_dry_run_counts_them(tmp_path: Path) -> None:
    assert REASON in estimate(scored(shard(tmp_path / "0.tar"), tmp_path / "c", dry_run=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filters": FiltersConfig(clip_score=0.28)}, r"filters\.clip_score=0\.28: 100 x cosine is wanted"),
        ({"filters": FiltersConfig(clip_score=-1.0)}, r"filters\.clip_score=-1: 100 x cosine"),
        ({"text_storage": "none", "caption_key": (), "stored": "latents"}, "no caption is read, so leave it out"),
        ({"text_storage": "full", "caption_key": ()}, "filters.clip_score=30.0 with stored=pixels and no caption_key"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(scored("s", "c", **changes))


def test_a_clip_that_sees_pictures_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = load_text(ENCODERS)
    require_transform(other, (64, 64))
    with pytest.raises(ConfigError, match="sees"):
        require_transform(other, (32, 32))
    other.model.visual.preprocess_cfg = {"resize_mode": "squash"}
    with pytest.raises(ConfigError, match="resize_mode=squash, and only shortest is supported"):
        require_transform(other, (64, 64))


def test_verify_finds_a_score_that_is_too_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shard(tmp_path / "0.tar")
    with monkeypatch.context() as patch:  # an encode that lets all of them pass
        patch.setattr(clip.ClipFilter, "judged", lambda self, group: iter(group))
        main(scored(source, tmp_path / "c"))
    with pytest.raises(DataError, match=r"its CLIP score is .*, below filters\.clip_score=30"):
        verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, min_psnr=0.0))
