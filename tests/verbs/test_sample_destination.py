"""`latentmill sample`: the file it writes, what it never writes over, and how much it may be asked for."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.limits import files_of_at_most, umask, wrong_modes
from made.run import SAMPLER, make_cache, make_run
from pipeline import sample
from pipeline.config import SampleConfig
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError, DestinationExists, StorageError
from pipeline.inference import trained as loading
from pipeline.inference.requests import captions
from pipeline.report.grid import captioned, captioned_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample-dest")
    make_cache(folder)
    make_run(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> SampleConfig:
    return SampleConfig(run=str(folder / "run"), n=1, dest=str(tmp_path / "out.png"), sampler=SAMPLER, device="cpu")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal must come before the run's weights are read."""
    monkeypatch.setattr(sample, "load_trained", lambda *a: 1 / 0)


def rows_of(config: SampleConfig, *prompts: str) -> list[np.ndarray]:
    """Images of each prompt, (n, H, W, 3) uint8."""
    return [row.images for row in sample.sample_rows(replace(config, prompt=prompts))]


def row(width: int = 64, height: int = 64, count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


# --------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG")])
def test_the_name_says_the_format_and_a_picture_of_ours_is_replaced(
    config: SampleConfig, tmp_path: Path, name: str, kind: str
) -> None:
    config = replace(config, dest=str(tmp_path / "new" / name))
    with umask(0o027):
        for prompt in ("a red circle", "a blue box"):
            assert sample.main(replace(config, prompt=(prompt,))) == 0
    with Image.open(config.dest) as picture:
        assert picture.format == kind
        expected = captioned(rows_of(config, "a blue box"), ["a blue box"])
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).mean() < 3
    assert wrong_modes(tmp_path / "new", 0o027) == {}


@pytest.mark.parametrize("name", ["notes.txt", "samples", "a.webp", "a.png.gz", ".png"])
def test_a_name_that_is_no_pictures_is_refused(config: SampleConfig, tmp_path: Path, name: str, no_work: None) -> None:
    with pytest.raises(ConfigError, match=r"a picture's name ends in \.png, \.jpg, \.jpeg"):
        sample.main(replace(config, dest=str(tmp_path / name)))


def test_what_others_made_is_never_written_over(config: SampleConfig, tmp_path: Path, no_work: None) -> None:
    Image.fromarray(row(200, 200)[0]).save(tmp_path / "photo.png")
    Image.new("RGB", (200, 200), (250, 250, 249)).save(tmp_path / "plain.png")
    Image.new("L", (200, 200)).save(tmp_path / "grey.png")
    Image.fromarray(row(200, 200)[0]).save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("mine")
    (tmp_path / "empty.png").write_text("")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:100])
    for path in sorted(tmp_path.iterdir()):
        before = path.read_bytes()
        with pytest.raises(DestinationExists, match="exists and `latentmill sample` did not write it"):
            sample.main(replace(config, dest=str(path)))
        assert path.read_bytes() == before
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DestinationExists, match="is a folder"):
        sample.main(replace(config, dest=str(tmp_path / "folder.png")))
    with pytest.raises(DestinationExists, match="is a file, and a folder is wanted"):
        sample.main(replace(config, dest=str(tmp_path / "text.png" / "a.png")))


def test_pictures_of_any_shape_and_caption_are_known_as_ours(tmp_path: Path) -> None:
    from pipeline.inference.picture_file import encoded, is_ours
    from pipeline.report.grid import MARGIN, PAPER

    for words in (["a" * 500], ["Ä" * 40, "jgqÿ/|_" * 30], ["", "日本語"]):
        picture = captioned([row(32 * (i + 1), 48, 3) for i in range(len(words))], words)
        for kind in ("PNG", "JPEG"):
            assert is_ours(encoded(picture, kind), MARGIN // 2, PAPER)
        width, height = captioned_size(3, [(32 * (i + 1), 48) for i in range(len(words))])
        assert picture.width <= width and picture.height <= height


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(config: SampleConfig, tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(StorageError, match=r"cannot write \S+out\.png") as caught:
        sample.main(config)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# How much


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 10**9},
        {"n": 10**18},
        {"size": ("1000000x1000000",)},
        {"size": ("16x100000000",)},
        {"size": ("16384x16384",)},
        {"n": 1000, "size": ("512x512",)},
    ],
)
def test_more_pixels_than_a_picture_may_have_are_refused_before_any_work(
    config: SampleConfig, no_work: None, changes: dict[str, Any]
) -> None:
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"the picture would have .* pixels, and 134,217,728 are the most"):
        sample.main(replace(config, **changes))
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000


def test_more_pixels_of_the_caches_own_size_are_refused_before_the_encoders(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_encoders", lambda *a, **k: 1 / 0)
    with pytest.raises(ConfigError, match="the picture would have"):
        rows_of(replace(config, n=8100), "a", "b")  # of 1 x 1 pixels they would fit


def test_a_jpeg_is_no_wider_than_its_format_allows(config: SampleConfig, no_work: None) -> None:
    with pytest.raises(ConfigError, match=r"65,500 a side are the most"):
        sample.main(replace(config, n=600, dest=config.dest.replace(".png", ".jpg")))


def test_captions_are_encoded_in_batches(config: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a red circle", "a blue box", "a green cross"]
    whole = rows_of(config, *prompts)
    counts: list[int] = []
    encode = captions.encode_captions

    def counted(tower: Any, some: list[str], **settings: Any) -> Any:
        counts.append(len(some))
        return encode(tower, some, **settings)

    monkeypatch.setattr(captions, "encode_captions", counted)
    monkeypatch.setattr(captions, "CAPTIONS", 2)
    batched = rows_of(config, *prompts)
    assert counts == [2, 2, 1]  # with the negative prompt and the empty caption
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(whole, batched, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Values that mean what they say


def test_guidance_0_is_0_and_no_guidance_is_the_samplers(config: SampleConfig) -> None:
    sampled = {scale: rows_of(replace(config, guidance=scale), "a red circle")[0] for scale in (None, 0.0, 2.0, 1.0)}
    assert SAMPLER.guidance == 2.0 and (sampled[None] == sampled[2.0]).all()
    zero = replace(config, sampler=replace(SAMPLER, guidance=0.0))
    assert (sampled[0.0] == rows_of(zero, "a red circle")[0]).all()
    assert (sampled[0.0] != sampled[2.0]).any() and (sampled[0.0] != sampled[1.0]).any()


@pytest.mark.parametrize(("word", "value"), [("guidance=0", 0.0), ("guidance=null", None), ("n=2", None)])
def test_the_command_line_tells_0_from_nothing(word: str, value: float | None) -> None:
    assert load("sample", ["run=r", word]).guidance == value


@pytest.mark.parametrize("verb", ["sample", "eval", "demo"])
def test_seeds_beyond_63_bits_are_refused_in_one_line(verb: str) -> None:
    run = [] if verb == "demo" else ["run=r"]
    for seed in (2**63, 2**64, 10**30, -1):
        with pytest.raises(ConfigError, match=rf"seed={seed}: a whole number"):
            load(verb, [*run, f"seed={seed}"])


def test_the_largest_seed_draws(config: SampleConfig) -> None:
    largest = rows_of(replace(config, seed=2**63 - 1), "a red circle")[0]
    assert (largest != rows_of(config, "a red circle")[0]).any()
