"""`latentmill sample` that begins from an image, or keeps a region of one, with a model of any task."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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
from pipeline.config.check.groups import check_start
from pipeline.config.loading.load import load
from pipeline.diffusion.hooks import Hooks
from pipeline.errors import ConfigError
from pipeline.inference import trained
from pipeline.inference.requests.request import Request
from pipeline.inference.steering.images import of_images

RUNS: dict[str, TaskConfig] = {
    "text": TextTask(),
    "unconditional": UnconditionalTask(),
    "class": ClassTask(),
    "layout": LayoutTask(paint=2),
    "semantic": SemanticTask(),
    "superres": SuperresTask(),
    "inpaint": InpaintTask(),
}
FREE = tuple(name for name in RUNS if name not in ("superres", "inpaint"))
"""Tasks whose condition is no image."""
IMAGE = pixels(32, 48)
HOLE = np.zeros((32, 48), np.uint8)
HOLE[9:24, 10:30] = 1
Ask = Callable[..., SampleConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoders are loaded once for all tests."""
    stage, tower = asked.encoders()
    monkeypatch.setattr(trained, "load_autoencoder", lambda *_: stage)
    monkeypatch.setattr(trained, "load_text", lambda *_: tower)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The image and the mask, what each task is given besides, and some that do not fit."""
    labels = np.zeros((32, 48), np.uint8)
    labels[:, 24:] = 3
    return {
        "image": picture(tmp_path / "image.png", IMAGE),
        "mask": picture(tmp_path / "mask.png", 255 * HOLE),
        "boxes": boxes_file(tmp_path / "boxes.json", [["red star", 0.1, 0.2, 0.5, 0.9]]),
        "labels": picture(tmp_path / "labels.png", labels),
        "small": picture(tmp_path / "small.png", pixels(8, 12)),
        "square": picture(tmp_path / "square.png", pixels(64, 64)),
        "odd": picture(tmp_path / "odd.png", pixels(33, 48)),
        "nothing": picture(tmp_path / "nothing.png", 0 * HOLE),
        "deep": picture(tmp_path / "deep.png", np.zeros((32, 48), np.uint16)),
    }


@pytest.fixture
def ask(folder: Path, files: dict[str, str]) -> Ask:
    """A SampleConfig of one of RUNS, which is made once, with what its task needs. Values such as "{image}" are names
    in `files`."""

    def of(name: str, **keys: Any) -> SampleConfig:
        task = RUNS[name]
        if not (folder / name).exists():
            make_run(folder / name, task, asked.contract(text="full" if name == "text" else ""))
        own = {"class": {"class_": ("3",)}, "layout": {"boxes": ("{boxes}",)}, "semantic": {"labels": ("{labels}",)}}
        keys = {**own.get(name, {}), "guidance": 1.0, **keys}
        filled = {k: tuple(v.format(**files) for v in x) if isinstance(x, tuple) else x for k, x in keys.items()}
        return sample_config(folder / name, **filled)

    return of


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Hooks]:
    """The hooks that each batch is drawn with. Nothing is drawn: images are black."""
    hooks: list[Hooks] = []

    def noted(*arguments: Any) -> tuple[np.ndarray, int]:
        hooks.append(arguments[-1])
        _, height, width = arguments[7]
        return np.zeros((len(arguments[5]), 8 * height, 8 * width, 3), np.uint8), 0

    monkeypatch.setattr(sample, "draw", noted)
    return hooks


def rows_of(config: SampleConfig) -> list[np.ndarray]:
    return [row.images for row in sample.sample_rows(config)]


def latents_of(image: np.ndarray) -> torch.Tensor:
    """(C, h, w): the posterior mean, scaled."""
    stage, _ = asked.encoders()
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    return (stage.encode(x)[0, :4] - stage.shift) * stage.scale


# --------------------------------------------------------------------------------------------------------------------
# Begin from an image


@pytest.mark.parametrize("name", [*FREE, "inpaint"])
def test_images_of_every_task_begin_from_the_image_that_is_given(ask: Ask, given: list[Hooks], name: str) -> None:
    """Of inpainting, which is given an image anyway, from that."""
    mask = {"mask": ("{mask}",)} if name == "inpaint" else {}
    (row,) = sample.sample_rows(ask(name, image=("{image}",), strength=0.5, **mask))
    (hooks,) = given
    assert row.images.shape == (2, 32, 48, 3) and hooks.keep is None and not hooks.steer
    assert hooks.start is not None and hooks.start.strength == 0.5
    torch.testing.assert_close(hooks.start.latents_BCHW, torch.stack([latents_of(IMAGE)] * 2), rtol=1e-4, atol=1e-5)


def test_without_strength_inpainting_begins_from_noise(ask: Ask, given: list[Hooks]) -> None:
    rows_of(ask("inpaint", image=("{image}",), mask=("{mask}",)))
    assert given == [Hooks()]


def test_each_row_has_its_own_image_and_size_in_batches_of_one_size(ask: Ask, given: list[Hooks]) -> None:
    config = ask("text", prompt=("a star", "a box", "a cross"), image=("{image}", "{square}", "{image}"), strength=1.0)
    rows = sample.sample_rows(replace(config, sampler=replace(config.sampler, batch=64)))
    assert [row.images.shape[1:3] for row in rows] == [(32, 48), (64, 64), (32, 48)]
    assert [row.request.label for row in rows][:2] == [
        "a star (image.png, strength 1)",
        "a box (square.png, strength 1)",
    ]
    starts = [hooks.start.latents_BCHW for hooks in given if hooks.start is not None]
    assert [tuple(start.shape) for start in starts] == [(4, 4, 4, 6), (2, 4, 8, 8)]
    torch.testing.assert_close(starts[1][0], latents_of(pixels(64, 64)), rtol=1e-4, atol=1e-5)


def test_what_is_drawn_depends_on_the_image_the_strength_and_the_noise_and_not_on_batches(ask: Ask) -> None:
    config = ask("text", prompt=("a star",), image=("{square}",), strength=0.5)
    (first,) = rows_of(config)
    (alone,) = rows_of(replace(config, sampler=replace(config.sampler, batch=1)))
    assert np.abs(first.astype(int) - alone.astype(int)).max() <= 1 and (first[0] != first[1]).any()
    (same,) = rows_of(config)
    assert (same == first).all()
    for other in ({"strength": 1.0}, {"strength": None, "image": ()}, {"seed": 1}):
        assert (rows_of(replace(config, **other))[0] != first).any()
    picture(Path(config.image[0]), pixels(64, 64, 1))
    assert (rows_of(config)[0] != first).any()


def test_latents_are_encoded_in_float32_whatever_decodes() -> None:
    """And scaled as the cache's."""

    class Exact:
        device = torch.device("cpu")

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 8, x.shape[2] // 8, x.shape[3] // 8), 5.0)

    stage = SimpleNamespace(float32=Exact, encode=lambda x: 1 / 0)
    contract = replace(asked.contract(), scale=0.5, shift=3.0)
    requests = [Request(label="", size=(48, 32), image=IMAGE)]
    (steering,) = of_images(requests, 0.5, stage, contract)  # type: ignore[arg-type]
    hooks = steering.hooks([7], [0], (4, 4, 6))
    assert hooks.start is not None and (hooks.start.latents_BCHW == 1.0).all()


# --------------------------------------------------------------------------------------------------------------------
# Keep a region


@pytest.mark.parametrize("name", FREE)
def test_what_a_mask_does_not_hide_is_the_image_to_the_bit_with_a_model_of_any_task(ask: Ask, name: str) -> None:
    (row,) = sample.sample_rows(ask(name, image=("{image}",), mask=("{mask}",)))
    assert row.images.shape == (2, 32, 48, 3) and row.request.label.endswith("image.png, mask.png") is (
        name in ("text", "unconditional")
    )
    assert (row.images[:, HOLE == 0] == IMAGE[HOLE == 0]).all()
    assert (row.images[:, HOLE != 0] != IMAGE[HOLE != 0]).any()
    assert (row.images[0] != row.images[1]).any()
    if name in ("text", "unconditional", "class"):
        assert row.request.shown is not None
        assert (row.request.shown[HOLE == 0] == IMAGE[HOLE == 0]).all() and (row.request.shown[HOLE != 0] == 128).all()


def test_a_latent_position_is_made_anew_if_any_of_its_pixels_is(
    ask: Ask, given: list[Hooks], files: dict[str, str]
) -> None:
    """Nothing that is white stays."""
    hole = np.zeros((32, 48), np.uint8)
    hole[15, 47] = 255  # the last pixel of position (1, 5)
    picture(Path(files["mask"]), hole)
    rows_of(ask("text", image=("{image}",), mask=("{mask}",), n=1))
    (hooks,) = given
    assert hooks.start is None and hooks.keep is not None
    assert hooks.keep.new_B1HW.shape == (1, 1, 4, 6) and hooks.keep.new_B1HW.nonzero().tolist() == [[0, 0, 1, 5]]
    torch.testing.assert_close(hooks.keep.latents_BCHW[0], latents_of(IMAGE), rtol=1e-4, atol=1e-5)


def test_a_mask_and_a_strength_go_together(ask: Ask, given: list[Hooks]) -> None:
    (row,) = sample.sample_rows(ask("text", image=("{image}",), mask=("{mask}",), strength=0.75))
    (hooks,) = given
    assert hooks.start is not None and hooks.start.strength == 0.75 and hooks.keep is not None
    assert (row.images[:, HOLE == 0] == IMAGE[HOLE == 0]).all() and (row.images[:, HOLE != 0] == 0).all()
    assert row.request.label == "image.png, mask.png, strength 0.75"


def test_the_kept_part_guides_what_is_made_beside_it(ask: Ask, files: dict[str, str]) -> None:
    config = ask("unconditional", image=("{image}",), mask=("{mask}",), n=1)
    (first,) = rows_of(config)
    picture(Path(files["image"]), np.where(HOLE[..., None] == 0, pixels(32, 48, 1), IMAGE))
    (second,) = rows_of(config)
    assert (first[:, HOLE != 0] != second[:, HOLE != 0]).any()


def test_the_picture_begins_each_row_with_what_was_given(ask: Ask, tmp_path: Path) -> None:
    config = replace(ask("layout", image=("{image}",), strength=0.5), dest=str(tmp_path / "out.png"))
    assert sample.main(config) == 0
    with Image.open(config.dest) as sheet:
        shown = np.asarray(sheet)[12 : 12 + 96 : 3, 12 : 12 + 144 : 3]  # 48 pixels are shown three times as large
    assert (shown[30:, 40:] == IMAGE[30:, 40:]).all() and (shown != IMAGE).any()  # with its boxes' outlines


# --------------------------------------------------------------------------------------------------------------------
# What is refused: before weights are read, in one line


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("sample", ["strength=0.5"], "strength=0.5 is given without image: give image=FILE, the picture to begin from"),
        ("sample", ["image=a.png", "strength=0"], "strength=0: a number above 0 and at most 1 is wanted"),
        ("sample", ["image=a.png", "strength=1.01"], "strength=1.01: a number above 0 and at most 1 is wanted"),
        ("sample", ["image=a.png", "strength=nan"], "strength=nan: a number is wanted"),
        ("eval", ["strength=-0.5"], "strength=-0.5: a number above 0 and at most 1 is wanted"),
        (
            "sample",
            ["image=a.png", "strength=0.1", "sampler.steps=6"],
            "strength=0.1 of 6 denoising steps is no step: give more steps, or a strength of at least 0.167",
        ),
        ("eval", ["strength=0.1", "steps=[20,5]"], "strength=0.1 of 5 denoising steps is no step: give more steps, or"),
    ],
)
def test_strengths_that_mean_nothing_are_refused_before_the_run_is_read(
    verb: str, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(verb, ["run=r", *words])
    assert "\n" not in str(caught.value)


def test_the_strength_that_a_refusal_names_is_a_step() -> None:
    check_start(1.0, 1)
    for steps in range(2, 1001):
        with pytest.raises(ConfigError, match="at least") as caught:
            check_start(0.999 / steps, steps)
        check_start(float(str(caught.value).rpartition(" ")[2]), steps)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("text", {"image": ("{image}",)}, "image=image.png: nothing says what becomes of it: give strength=0.6 to be"),
        ("text", {"image": ("gone.png",), "strength": 0.5}, "image=gone.png: there is no such file"),
        (
            "text",
            {"image": ("{odd}",), "strength": 0.5},
            "image=odd.png has 48 x 33 pixels: this model makes multiples of 16 pixels; the nearest is 48 x 32",
        ),
        ("text", {"image": ("{deep}",), "strength": 0.5}, "image=deep.png has more than 8 bits a channel: save it wi"),
        ("text", {"image": ("{boxes}",), "strength": 0.5}, "image=boxes.json cannot be read as a picture"),
        (
            "class",
            {"image": ("{image}",), "strength": 0.5, "size": ("48x32",)},
            "size=48x32: the images have the size that image= says: leave size out",
        ),
        (
            "semantic",
            {"image": ("{square}",), "strength": 0.5},
            "image=square.png has 64 x 64 pixels and labels=labels.png has 48 x 32: give an image of that size",
        ),
        (
            "layout",
            {"image": ("{image}",), "mask": ("{small}",)},
            "mask=small.png has 12 x 8 pixels and image=image.png has 48 x 32: give a mask of the image's size",
        ),
        ("text", {"image": ("{image}",), "mask": ("{nothing}",)}, "mask=nothing.png hides nothing"),
        (
            "superres",
            {"image": ("{small}",), "strength": 0.5},
            "strength=0.5: a model of task=superres makes a large image of a small one and begins from noise: leave",
        ),
        (
            "superres",
            {"image": ("{image}",), "mask": ("{mask}",)},
            "mask: a model of task=superres takes no mask (it takes image): leave mask out",
        ),
        ("inpaint", {"image": ("{image}",), "strength": 0.5}, "a model of task=inpaint needs mask: give mask=FILE"),
    ],
)
def test_what_cannot_be_done_with_an_image_is_refused(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, name: str, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(sample, "load_trained", lambda *a: 1 / 0)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        rows_of(ask(name, **keys))
    assert "\n" not in str(caught.value)
