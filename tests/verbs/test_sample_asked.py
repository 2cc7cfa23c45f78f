"""`latentmill sample` of every task: classes, boxes, label maps and images beside captions, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made import asked
from made.asked import NAMES, boxes_file, make_run, picture, pixels, sample_config
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
from pipeline.data.format.members import member_shape
from pipeline.errors import ConfigError
from pipeline.inference import trained
from pipeline.inference.pictures import draw
from pipeline.inference.requests.request import make_requests
from pipeline.inference.trained import encode_captions, load_trained

RUNS: dict[str, tuple[TaskConfig, str]] = {
    "text": (TextTask(), "full"),
    "tokens": (TextTask(encoder="transformer", depth=1, heads=2), "tokens"),
    "unconditional": (UnconditionalTask(), ""),
    "class": (ClassTask(), ""),
    "vector": (ClassTask(mode="vector"), ""),
    "layout": (LayoutTask(paint=2), ""),
    "layout_text": (LayoutTask(text=True), "trimmed"),
    "semantic": (SemanticTask(), ""),
    "superres": (SuperresTask(), ""),
    "superres_noise": (SuperresTask(noise=100), ""),
    "superres_text": (SuperresTask(text=True, drop=0.1), "full"),
    "inpaint": (InpaintTask(), ""),
    "inpaint_text": (InpaintTask(text=True, drop=0.1), "full"),
    "undropped": (ClassTask(drop=0.0), ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asked")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoders are loaded once for all tests."""
    stage, tower = asked.encoders()
    monkeypatch.setattr(trained, "load_autoencoder", lambda *_: stage)
    monkeypatch.setattr(trained, "load_text", lambda *_: tower)


@pytest.fixture
def ask(folder: Path, tmp_path: Path) -> Any:
    """A SampleConfig of one of RUNS, which is made once."""

    def of(name: str, **keys: Any) -> SampleConfig:
        task, text = RUNS[name]
        if not (folder / name).exists():
            make_run(folder / name, task, asked.contract(text=text))
        config = sample_config(folder / name, **keys)
        return replace(config, dest=str(tmp_path / "out.png"))

    return of


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A file for each key: of 48 x 32 pixels where it is a picture, small ones of 12 x 8."""
    mask = np.zeros((32, 48), np.uint8)
    mask[8:24, 10:30] = 255
    labels = np.zeros((32, 48), np.uint8)
    labels[:, 24:] = 3
    return {
        "boxes": boxes_file(tmp_path / "boxes.json", [["red star", 0.1, 0.2, 0.5, 0.9], [4, 0.5, 0.0, 1.0, 0.5]]),
        "labels": picture(tmp_path / "labels.png", labels),
        "small": picture(tmp_path / "small.png", pixels(8, 12)),
        "image": picture(tmp_path / "image.png", pixels(32, 48)),
        "mask": picture(tmp_path / "mask.png", mask),
    }


def rows_of(config: SampleConfig) -> list[np.ndarray]:
    return [row.images for row in sample.sample_rows(config)]


def of_files(files: dict[str, str], name: str) -> dict[str, Any]:
    """What a run is asked for."""
    prompt: dict[str, Any] = {"prompt": ("a red star",)} if "text" in name or name == "tokens" else {}
    task = name.partition("_")[0]
    asked: dict[str, dict[str, Any]] = {
        "class": {"class_": ("3", "red star")},
        "vector": {"class_": ("3",)},
        "undropped": {"class_": ("3",), "guidance": 1.0},
        "layout": {"boxes": (files["boxes"],)},
        "semantic": {"labels": (files["labels"],)},
        "superres": {"image": (files["small"],)},
        "inpaint": {"image": (files["image"],), "mask": (files["mask"],)},
    }
    return prompt | asked.get(task, {})


# --------------------------------------------------------------------------------------------------------------------
# Every task


EACH = (
    "text",
    "tokens",
    "unconditional",
    "class",
    "vector",
    "layout_text",
    "semantic",
    "superres_noise",
    "inpaint_text",
)
"""A run of each task; of those that may take captions, with them."""


@pytest.mark.parametrize("name", EACH)
def test_images_of_every_task_depend_on_their_row_and_number_and_not_on_batches(
    ask: Any, files: dict[str, str], name: str
) -> None:
    config = ask(name, **of_files(files, name), n=3)
    whole, other = rows_of(config), rows_of(replace(config, sampler=replace(config.sampler, batch=2)))
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(whole, other, strict=True))
    assert (whole[0][0] != whole[0][1]).any()


@pytest.mark.parametrize("name", [name for name in EACH if name != "unconditional"])
def test_what_a_model_is_asked_for_reaches_it(ask: Any, files: dict[str, str], tmp_path: Path, name: str) -> None:
    first = rows_of(ask(name, **of_files(files, name)))
    files["boxes"] = boxes_file(tmp_path / "boxes.json", [[2, 0.0, 0.0, 0.3, 0.3]])
    picture(tmp_path / "labels.png", np.full((32, 48), 7, np.uint8))
    picture(tmp_path / "small.png", pixels(8, 12, 1))
    mask = np.asarray(Image.open(files["mask"]))
    picture(tmp_path / "image.png", np.where(mask[..., None] == 0, pixels(32, 48, 1), pixels(32, 48)))
    keys = of_files(files, name)
    if "class_" in keys:
        keys["class_"] = tuple("5" for _ in keys["class_"])
    elif set(keys) == {"prompt"}:
        keys["prompt"] = ("a blue box",)
    second = rows_of(ask(name, **keys))
    hidden = mask != 0 if "mask" in keys else slice(None)
    assert (first[0][:, hidden] != second[0][:, hidden]).any()


@pytest.mark.parametrize("name", ["layout_text", "superres_text", "inpaint_text"])
def test_hybrids_take_captions_and_negative_prompts_as_well(ask: Any, files: dict[str, str], name: str) -> None:
    config = ask(name, **of_files(files, name))
    plain = rows_of(config)
    rows = rows_of(replace(config, prompt=("a red star", "a blue square")))
    assert len(rows) == 2 and np.abs(rows[0].astype(int) - plain[0].astype(int)).max() <= 1
    assert (rows[1] != rows[0]).any()
    assert (rows_of(replace(config, negative="a blue square"))[0] != plain[0]).any()
    same = rows_of(replace(config, negative="a red star"))
    unguided = rows_of(replace(config, guidance=1.0))
    assert np.abs(same[0].astype(int) - unguided[0].astype(int)).max() <= 1  # away from itself: nothing else was nulled


@pytest.mark.parametrize("name", ["text", "unconditional"])
def test_a_row_is_what_the_denoiser_draws_from_encoded_captions(ask: Any, name: str) -> None:
    """To the bit: text states of all captions, the negative prompt and the empty caption in one pass of the tower, and
    noise of (seed, image number)."""
    prompts = ("a red star", "a blue square") if name == "text" else ()
    config = replace(ask(name, prompt=prompts, seed=3), sampler=replace(asked.SAMPLER, guidance=2.0 if prompts else 1))
    stage, tower = asked.encoders()
    states = encode_captions(tower, [*prompts, "", ""])
    loaded = load_trained(config.run)
    denoiser = loaded.denoiser(states[-1], "cpu", packed=True)
    numbers = list(range(2 * config.rows))
    for start in range(0, len(numbers), 3):
        part = numbers[start : start + 3]
        batch = {"text": states[[number // 2 for number in part]]} if prompts else {}
        conditioning = denoiser.task(batch)
        null = denoiser.task({"text": states[-1].expand(len(part), -1, -1)}) if prompts else None
        device = torch.device("cpu")
        settings = loaded.info.config.diffusion
        wanted, _ = draw(denoiser, stage, settings, config.sampler, conditioning, part, 3, (4, 8, 8), device, null)
        drawn = np.concatenate(rows_of(config))[part]
        assert (drawn == wanted).all()


def test_a_cache_without_captions_loads_no_text_tower(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "load_text", lambda *a: 1 / 0)
    assert len(rows_of(ask("unconditional", n=1))) == 1


# --------------------------------------------------------------------------------------------------------------------
# Each task


def test_classes_are_given_by_number_or_by_name(ask: Any) -> None:
    rows = sample.sample_rows(ask("class", class_=("2", "red star", "0")))
    assert [row.request.label for row in rows] == ["red star (2)", "red star (2)", "red circle (0)"]
    config = load("sample", ["run=r", "class=[3,red star]", "class=tench, Tinca tinca", "guidance=1"])
    assert config.class_ == ("3", "red star", "tench, Tinca tinca")


def test_boxes_are_drawn_over_the_pictures_and_not_into_the_images(ask: Any, files: dict[str, str]) -> None:
    config = ask("layout", boxes=(files["boxes"],), n=1)
    (row,) = sample.sample_rows(config)
    assert row.request.label == "red star, blue square" and row.request.over is not None
    over = row.request.over(row.images)
    assert (over[0, 13, 6:32] == over[0, 13, 6]).all()  # y 0.2, x 0.1 to 0.5 of 64 pixels: one colour
    assert (over[0, 14:57, 7:31] == row.images[0, 14:57, 7:31]).all()
    for draw_boxes in (True, False):
        assert sample.main(replace(config, draw_boxes=draw_boxes)) == 0
        with Image.open(config.dest) as sheet:
            shown = np.asarray(sheet)[12 : 12 + 128 : 2, 12 + 128 + 12 : 12 + 2 * 128 + 12 : 2]
        assert (shown == (over if draw_boxes else row.images)[0]).all()


def test_label_maps_and_images_decide_the_size_of_the_pictures(ask: Any, files: dict[str, str]) -> None:
    for name in ("semantic", "superres", "inpaint"):
        assert rows_of(ask(name, **of_files(files, name)))[0].shape == (2, 32, 48, 3)
    assert rows_of(ask("layout", boxes=(files["boxes"],), size=("96x32",)))[0].shape == (2, 32, 96, 3)


def test_sizes_of_files_may_be_mixed(ask: Any, files: dict[str, str], tmp_path: Path) -> None:
    other = picture(tmp_path / "other.png", pixels(16, 16))
    rows = rows_of(ask("superres", image=(files["small"], other)))
    assert [row.shape for row in rows] == [(2, 32, 48, 3), (2, 64, 64, 3)]


def test_what_a_mask_does_not_hide_is_the_image_to_the_bit(ask: Any, files: dict[str, str]) -> None:
    (row,) = sample.sample_rows(ask("inpaint", image=(files["image"],), mask=(files["mask"],)))
    mask = np.asarray(Image.open(files["mask"])) != 0
    assert (row.images[:, ~mask] == pixels(32, 48)[~mask]).all()
    assert (row.images[:, mask] != pixels(32, 48)[mask]).any()
    assert row.request.shown is not None
    assert (row.request.shown[~mask] == pixels(32, 48)[~mask]).all() and (row.request.shown[mask] == 128).all()


def test_the_picture_begins_each_row_with_what_was_given(ask: Any, files: dict[str, str]) -> None:
    config = ask("superres", image=(files["small"],))
    assert sample.main(config) == 0
    with Image.open(config.dest) as sheet:
        assert sheet.width == 3 * 144 + 12 + 2 + 24  # 48 pixels are shown three times as large
        shown = np.asarray(sheet)[12 : 12 + 96 : 12, 12 : 12 + 144 : 12]
    assert (shown == pixels(8, 12)).all()


def test_conditions_are_those_that_a_cache_would_hold(files: dict[str, str]) -> None:
    """Names, dtypes and shapes are the contract's, but for the axis of variants."""
    stage, _ = asked.encoders()
    contract = asked.contract(conditions=asked.SINGLE)
    members = {member.name: member for member in contract.members}
    for name in ("class", "layout", "semantic", "superres", "inpaint"):
        task = RUNS[name][0]
        for request in make_requests(task, contract, 2).rows(SampleConfig(run="r", **of_files(files, name))):
            request = make_requests(task, contract, 2).encoded(request, stage)
            assert set(request.members) == set(task.members)
            for member, array in request.members.items():
                facts = replace(members[member], shape=tuple(-1 if n > 5 else n for n in members[member].shape))
                assert array.shape == member_shape(facts, contract, request.size, None), member
                assert array.dtype == members[member].dtype


def test_the_members_of_inpainting_are_what_encode_stores(files: dict[str, str]) -> None:
    """The posterior mean of the image with a grey hole, and eight pixels of the mask to a byte."""
    stage, _ = asked.encoders()
    requests = make_requests(InpaintTask(), asked.contract(), 2)
    (request,) = requests.rows(SampleConfig(run="r", image=(files["image"],), mask=(files["mask"],)))
    members = requests.encoded(request, stage).members
    mask = np.asarray(Image.open(files["mask"])) != 0
    image = pixels(32, 48).astype(np.float32) / np.float32(127.5) - 1
    image[mask] = 0
    mean = stage.encode(torch.from_numpy(image).permute(2, 0, 1)[None])[0, :4].half()
    assert (members["cond.masked"] == mean.numpy()).all()
    assert (np.unpackbits(members["cond.mask"], axis=1, count=48) == mask).all()


def test_names_and_numbers_of_boxes_mean_the_same(tmp_path: Path) -> None:
    by_name, by_number = (
        boxes_file(tmp_path / f"{i}.json", [[which, 0.25, 0, 0.5, 1]]) for i, which in enumerate((NAMES[5], 5))
    )
    requests = make_requests(LayoutTask(), asked.contract(), 2)
    first, second = requests.rows(SampleConfig(run="r", boxes=(by_name, by_number)))
    assert (first.members["cond.boxes"] == second.members["cond.boxes"]).all()
    assert first.members["cond.boxes"][0].tolist() == [5, 0.25, 0, 0.5, 1]


# --------------------------------------------------------------------------------------------------------------------
# Guidance


def test_a_model_trained_without_dropping_is_sampled_without_guidance_unless_it_is_asked(
    ask: Any, files: dict[str, str]
) -> None:
    for name in ("undropped", "superres", "unconditional"):
        keys = {**of_files(files, name), "n": 1}
        default = sample_config(Path()).sampler
        default = replace(default, guidance=type(default)().guidance)
        silent = rows_of(ask(name, **{**keys, "guidance": None, "sampler": default}))
        assert (silent[0] == rows_of(ask(name, **{**keys, "guidance": 1.0}))[0]).all()
        for wanted in ({"guidance": 3.0}, {"guidance": None, "sampler": replace(default, guidance=2.0)}):
            with pytest.raises(ConfigError, match=r"guidance=[23]: .* leave guidance out, or give guidance=1"):
                rows_of(ask(name, **{**keys, **wanted}))


# --------------------------------------------------------------------------------------------------------------------
# What is refused: before weights are read, in one line


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "load_trained", lambda *a: 1 / 0)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("class", {"prompt": ("a star",), "class_": ("1",)}, "prompt: a model of task=class takes no prompt (it takes"),
        ("class", {"negative": "a star", "class_": ("1",)}, "negative: a model of task=class takes no negative"),
        ("unconditional", {"class_": ("1",)}, "takes no class (it is asked for nothing): leave class out"),
        ("text", {"labels": ("{labels}",)}, "takes no labels (it takes prompt, negative): leave labels out"),
        ("layout", {"boxes": ("{boxes}",), "prompt": ("a",)}, "takes no prompt (it takes boxes): leave prompt out"),
        ("class", {}, "a model of task=class needs class: give class=3, or a name"),
        ("inpaint", {"image": ("{image}",)}, "a model of task=inpaint needs mask: give mask=FILE"),
        ("class", {"class_": ("9",)}, "class 9: a number from 0 to 8 is wanted"),
        ("class", {"class_": ("-1",)}, "class -1"),
        ("class", {"class_": ("red starr",)}, "class red starr: there is no such name, did you mean red star"),
        (
            "semantic",
            {"labels": ("{labels}",), "size": ("64x64",)},
            "size=64x64: the images have the size that labels=",
        ),
        ("superres", {"image": ("gone.png",)}, "image=gone.png: there is no such file"),
        ("layout", {"boxes": ("{image}",)}, "boxes=image.png"),
    ],
)
def test_keys_that_a_task_does_not_take_or_lacks_are_refused(
    ask: Any, files: dict[str, str], no_weights: None, name: str, keys: dict[str, Any], message: str
) -> None:
    keys = {key: tuple(v.format(**files) for v in x) if isinstance(x, tuple) else x for key, x in keys.items()}
    keys = {**keys, "guidance": 1.0} if "negative" not in keys else keys
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        rows_of(ask(name, **keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[9, 0, 0, 1, 1]], "boxes=b.json: box_class_out_of_range: 9, the classes are 0 to 8"),
        ([["red starr", 0, 0, 1, 1]], "boxes=b.json: class red starr: there is no such name, did you mean red star"),
        ([[1, 0.5, 0, 0.2, 1]], "boxes=b.json: boxes_inverted"),
        ([[1, 0, 0, 1.2, 1]], "boxes=b.json: boxes_outside"),
        ([[1, 0, 0, 1]], "boxes=b.json: boxes_unreadable"),
        ([[1, 0, 0, 0.5, 0.5]] * 6, "boxes=b.json: it has 6 boxes, the model was given at most 5"),
        ({"box": []}, "boxes=b.json: it holds no list of boxes"),
    ],
)
def test_boxes_that_encode_would_reject_are_refused(
    ask: Any, tmp_path: Path, no_weights: None, boxes: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        rows_of(ask("layout", boxes=(boxes_file(tmp_path / "b.json", boxes),)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((32, 48), 10, np.uint8), "label_out_of_range: a pixel is 10, the labels are 0 to 9"),
        (np.zeros((32, 48), np.uint16), "its pixels are 16-bit grey, not 8-bit grey"),
        (pixels(32, 48), "its pixels are colours, not 8-bit grey"),
        (
            np.zeros((30, 48), np.uint8),
            "labels=l.png has 48 x 30 pixels: this model makes multiples of 16 pixels; the nearest is 48 x 32",
        ),
    ],
)
def test_label_maps_that_encode_would_reject_or_the_model_cannot_make_are_refused(
    ask: Any, tmp_path: Path, no_weights: None, array: np.ndarray, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        rows_of(ask("semantic", labels=(picture(tmp_path / "l.png", array),)))


def test_images_and_masks_that_do_not_fit_are_refused(
    ask: Any, files: dict[str, str], tmp_path: Path, no_weights: None
) -> None:
    odd = picture(tmp_path / "odd.png", pixels(9, 12))
    message = "image=odd.png has 12 x 9 pixels, of which the model makes 48 x 36: .* multiples of 16 pixels; .* 12 x 8$"
    with pytest.raises(ConfigError, match=message):
        rows_of(ask("superres", image=(odd,)))
    with pytest.raises(ConfigError, match=r"image=odd.png has 12 x 9 pixels: .* the nearest is 16 x 16$"):
        rows_of(ask("inpaint", image=(odd,), mask=(odd,)))
    image = (files["image"],)
    with pytest.raises(ConfigError, match=r"mask=small.png has 12 x 8 .* image=image.png has 48 x 32: give a mask of"):
        rows_of(ask("inpaint", image=image, mask=(files["small"],)))
    nothing = picture(tmp_path / "nothing.png", np.zeros((32, 48), np.uint8))
    with pytest.raises(ConfigError, match=r"mask=nothing\.png hides nothing"):
        rows_of(ask("inpaint", image=image, mask=(nothing,)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mask=m.png"], "mask is given without image: give image=FILE"),
        (["boxes=[a.json,b.json]", "prompt=a", "prompt=b", "prompt=c"], "boxes: 2 for 3 rows"),
        (["image=[a.png,b.png]", "mask=[a.png,b.png,c.png]"], "image: 2 for 3 rows; give one for all rows"),
    ],
)
def test_keys_that_cannot_go_together_are_refused_before_the_run_is_read(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("sample", ["run=r", *words])


def test_more_pixels_than_a_picture_may_have_are_refused_with_what_was_given(
    ask: Any, files: dict[str, str], no_weights: None
) -> None:
    with pytest.raises(ConfigError, match="the picture would have"):
        rows_of(ask("superres", image=(files["small"],), n=10_000))
