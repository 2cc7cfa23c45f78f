"""`latentmill sample` of pictures larger than a model was trained on: whole, and in tiles."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made import asked
from made.asked import boxes_file, make_run, picture, pixels, sample_config
from pipeline import sample
from pipeline.config import (
    ClassTask,
    InpaintTask,
    LayoutTask,
    SampleConfig,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    UnconditionalTask,
)
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError
from pipeline.inference import trained
from pipeline.inference.tiles import choice
from pipeline.inference.tiles.stage import TiledStage

RUNS: dict[str, tuple[TaskConfig, str]] = {
    "text": (TextTask(), "full"),
    "unconditional": (UnconditionalTask(), ""),
    "class": (ClassTask(), ""),
    "layout": (LayoutTask(paint=2), ""),
    "semantic": (SemanticTask(), ""),
    "superres": (SuperresTask(noise=100), ""),
    "inpaint": (InpaintTask(text=True, drop=0.1), "full"),
}
"""Trained on 64 x 64 pixels."""
SIZE = (96, 128)
"""Width and height of what is drawn."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("larger")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoders are loaded once for all tests."""
    stage, tower = asked.encoders()
    monkeypatch.setattr(trained, "load_autoencoder", lambda *_: stage)
    monkeypatch.setattr(trained, "load_text", lambda *_: tower)


@pytest.fixture
def ask(folder: Path, tmp_path: Path) -> Any:
    """A SampleConfig of one of RUNS for pictures of SIZE."""
    width, height = SIZE
    mask, labels = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    mask[10:100, 20:70], labels[40:, 30:] = 255, 3
    size = {"size": (f"{width}x{height}",)}
    keys: dict[str, dict[str, Any]] = {
        "text": {"prompt": ("a red star",), **size},
        "unconditional": size,
        "class": {"class_": ("3",), **size},
        "layout": {"boxes": (boxes_file(tmp_path / "b.json", [[4, 0.1, 0.2, 0.5, 0.9]]),), **size},
        "semantic": {"labels": (picture(tmp_path / "labels.png", labels),)},
        "superres": {"image": (picture(tmp_path / "small.png", pixels(height // 4, width // 4)),), "noise": 10},
        "inpaint": {
            "image": (picture(tmp_path / "image.png", pixels(height, width)),),
            "mask": (picture(tmp_path / "mask.png", mask),),
        },
    }

    def of(name: str, **more: Any) -> SampleConfig:
        task, text = RUNS[name]
        if not (folder / name).exists():
            make_run(folder / name, task, asked.contract(text=text))
        return sample_config(folder / name, **{**keys[name], "dest": str(tmp_path / "out.png"), **more})

    return of


def images(config: SampleConfig) -> np.ndarray:
    (row,) = sample.sample_rows(config)
    return row.images


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("name", RUNS)
def test_every_task_draws_larger_pictures_than_it_was_trained_on_whole_and_in_tiles(ask: Any, name: str) -> None:
    whole, config = images(ask(name)), ask(name, tile="64")
    assert whole.shape == (2, SIZE[1], SIZE[0], 3)
    tiled = images(config)
    assert tiled.shape == whole.shape and differ(tiled, whole) > 1
    one_by_one = images(replace(config, sampler=replace(config.sampler, batch=1)))
    assert differ(one_by_one, tiled) <= 1
    assert (tiled[0] != tiled[1]).any()
    assert (images(ask(name, tile="128")) == whole).all()  # to the bit, where one tile covers the pictures


@pytest.mark.parametrize("name", ["superres", "inpaint", "semantic"])
def test_what_is_given_reaches_its_place_in_tiles(ask: Any, name: str, tmp_path: Path) -> None:
    """A change of one corner of a condition changes the picture there, and no place that shares no tile with it."""
    before = images(ask(name, tile="32", n=1))[0]
    if name == "semantic":
        labels = np.zeros((128, 96), np.uint8)
        labels[40:, 30:] = 3
        labels[:8, :8] = 7
        picture(tmp_path / "labels.png", labels)
    else:
        scale = 4 if name == "superres" else 1
        changed = pixels(128 // scale, 96 // scale)
        changed[: 16 // scale, : 40 // scale] = 255 - changed[: 16 // scale, : 40 // scale]
        picture(tmp_path / ("small.png" if name == "superres" else "image.png"), changed)
    after = images(ask(name, tile="32", n=1))[0]
    moved = np.abs(after.astype(int) - before.astype(int)).sum(-1)
    near, far = moved[:24, :40], moved[96:, 64:]
    assert near.mean() > 1 and near.mean() > 4 * far.mean()


def test_given_images_are_encoded_in_tiles(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    encode = TiledStage.encode

    def noted(self: TiledStage, x: Any) -> Any:
        seen.append((self.side, *x.shape))
        return encode(self, x)

    monkeypatch.setattr(TiledStage, "encode", noted)
    found = images(ask("inpaint", tile="64"))
    assert seen == [(8, 1, 3, 128, 96)]
    given, hidden = pixels(128, 96), np.zeros((128, 96), bool)
    hidden[10:100, 20:70] = True
    assert (found[:, ~hidden] == given[~hidden]).all()


def test_auto_says_what_it_chose_and_draws_it(
    ask: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = ask("semantic", tile="auto")
    whole = images(replace(config, tile="off"))
    assert (images(config) == whole).all()
    assert "sample: whole pictures" in capsys.readouterr().out
    monkeypatch.setattr(choice, "free_bytes", lambda device: 0)
    tiled = images(config)
    assert "sample: denoising in tiles of 64" in capsys.readouterr().out
    assert differ(tiled, whole) > 1


def test_a_size_that_is_too_large_for_memory_is_refused_before_weights_are_read(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "free_bytes", lambda device: 2_000_000)
    monkeypatch.setattr(sample, "load_trained", lambda *a: 1 / 0)
    with pytest.raises(ConfigError, match=r"^2 images of 96 x 128 pixels at once would take .* GB are free here: give"):
        images(ask("text"))
    with pytest.raises(ConfigError, match=r"^tile=40: tiles .* multiples of 16; the nearest is 32$"):
        images(ask("text", tile="40"))


@pytest.mark.parametrize("verb", ["sample", "eval"])
@pytest.mark.parametrize("tile", ["on", "0", "-64", "64x64", "1000000"])
def test_what_is_no_tile_is_refused(verb: str, tile: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"tile={tile}: off, auto, or a side in pixels is wanted")):
        load(verb, ["run=r", f"tile={tile}"])


@pytest.mark.parametrize("tile", ["off", "auto", "512"])
def test_tiles_are_given_by_a_word_or_a_number(tile: str) -> None:
    assert load("sample", ["run=r", f"tile={tile}"]).tile == tile
    assert load("eval", ["run=r", f"tile={tile}"]).tile == tile
