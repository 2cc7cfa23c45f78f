"""`latentmill sample guide=...`: models are led to a picture, a caption or a class for which they were not trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made import asked
from made.asked import make_run, picture, pixels, sample_config
from made.guided import make_classifier
from pipeline import sample
from pipeline.conditions.facts import ClassFacts
from pipeline.conditions.lowres import bicubic
from pipeline.config import (
    ClassTask,
    DiffusionConfig,
    GuideConfig,
    SampleConfig,
    SamplerConfig,
    TaskConfig,
    TextTask,
    UnconditionalTask,
)
from pipeline.errors import ConfigError, ContractMismatch, LatentmillError, RunError
from pipeline.inference import trained
from pipeline.inference.pictures import from_uint8
from pipeline.inference.steering import rows as rows_module
from pipeline.inference.trained import load_trained

RUNS: dict[str, tuple[TaskConfig, str]] = {
    "unconditional": (UnconditionalTask(), "full"),
    "captionless": (UnconditionalTask(), ""),
    "text": (TextTask(), "full"),
    "class": (ClassTask(), "full"),
}
SAMPLER = SamplerConfig(sampler="dpmpp_2m", steps=6, batch=3, guidance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guided")


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
        config = sample_config(folder / name, **{"sampler": SAMPLER, **keys})
        return replace(config, dest=str(tmp_path / "out.png"))

    return of


@pytest.fixture
def classifier(folder: Path) -> str:
    if not (folder / "classifier").exists():
        make_classifier(folder / "classifier", asked.contract())
    return str(folder / "classifier")


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A target of 16 x 16 pixels."""
    return picture(tmp_path / "small.png", smooth())


def smooth() -> np.ndarray:
    """(16, 16, 3) uint8 of which the autoencoder can make something."""
    ramp = np.linspace(40, 220, 16)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128.0), -1).astype(np.uint8)


def images_of(config: SampleConfig) -> np.ndarray:
    return np.concatenate([row.images for row in sample.sample_rows(config)])


def error(images: np.ndarray, target: np.ndarray) -> float:
    """Mean squared difference of images, made smaller, to a target."""
    return float(np.mean([(bicubic(image, 4).astype(float) - target) ** 2 for image in images]))


def test_images_become_like_a_picture_and_unlike_it_with_the_sign_turned(ask: Any, small: str) -> None:
    plain = images_of(ask("unconditional"))
    near, far = (
        images_of(ask("unconditional", guide=GuideConfig(image=weight, target=(small,)))) for weight in (1.0, -0.5)
    )
    errors = [error(images, smooth()) for images in (near, plain, far)]
    assert errors[0] < 0.85 * errors[1] and errors[1] < 0.95 * errors[2], errors


@pytest.mark.parametrize("sampler", ["heun", "unipc"])
def test_guided_images_depend_on_their_row_and_number_and_not_on_batches(
    ask: Any, small: str, classifier: str, sampler: Any
) -> None:
    guide = GuideConfig(image=0.5, clip=0.2, classifier=1.0, target=(small,), run=classifier, cutouts=2)
    config = ask(
        "unconditional",
        guide=guide,
        prompt=("a red circle", "a blue star"),
        class_=("0", "5"),
        sampler=replace(SAMPLER, sampler=sampler, steps=3),
    )
    whole = images_of(config)
    alone = images_of(replace(config, sampler=replace(config.sampler, batch=1)))
    assert np.abs(whole.astype(int) - alone.astype(int)).max() <= 1
    assert (whole[0] != whole[1]).any() and (whole[:2] != whole[2:]).any()


def test_a_caption_leads_a_model_that_reads_none(ask: Any) -> None:
    prompts = ("a large red circle", "a small blue star")
    plain, led = ask("unconditional"), ask("unconditional", guide=GuideConfig(clip=10.0, cutouts=0), prompt=prompts)
    rows = sample.sample_rows(led)
    assert [row.request.label for row in rows] == list(prompts)
    _, tower = asked.encoders()

    def cosine(images: np.ndarray, prompt: str) -> float:
        text = tower.pooled(tower.tokenize([prompt]))
        return float(torch.cosine_similarity(tower.encode_image(from_uint8(images)), text).mean())

    for row, prompt in zip(rows, prompts, strict=True):
        assert cosine(row.images, prompt) > cosine(images_of(plain), prompt) + 0.02


def test_a_class_leads_a_model_without_classes_and_its_weights_stay_packed(
    ask: Any, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier reads the noisy latents, so the network itself needs no gradients."""
    packed: list[bool] = []
    denoiser = trained.Trained.denoiser

    def noted(self: Any, *arguments: Any, **keys: Any) -> Any:
        packed.append(keys["packed"])
        return denoiser(self, *arguments, **keys)

    monkeypatch.setattr(trained.Trained, "denoiser", noted)
    guide = GuideConfig(classifier=3.0, run=classifier)
    rows = sample.sample_rows(ask("text", prompt=("a red star",), class_=("red star", "5"), guide=guide))
    assert [row.request.label for row in rows] == ["a red star, red star (2)", "a red star, blue star (5)"]
    assert (rows[0].images != rows[1].images).any()
    images_of(ask("text", guide=GuideConfig(clip=1.0), prompt=("a red star",)))
    assert packed == [True, False]


def test_the_target_is_shown_enlarged_at_the_beginning_of_its_row(ask: Any, small: str, tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png", pixels(64, 64))
    config = ask("unconditional", guide=GuideConfig(image=1.0, target=(small,), grey=True))
    (row,) = sample.sample_rows(config)
    assert row.request.label == "like small.png"
    assert row.request.shown is not None and row.request.shown.shape == (64, 64, 3)
    assert (row.request.shown[::4, ::4, 0] == row.request.shown[3::4, 3::4, 2]).all()
    assert sample.main(config) == 0
    with Image.open(config.dest) as sheet:
        assert sheet.width > 3 * 64
    (row,) = sample.sample_rows(replace(config, guide=GuideConfig(image=1.0, target=(whole,))))
    assert row.request.shown is not None and (row.request.shown == pixels(64, 64)).all()


def test_only_what_the_mask_shows_counts(ask: Any, small: str, tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    config = ask("unconditional", guide=GuideConfig(image=1.0, target=(small,)))
    masked = images_of(replace(config, guide=replace(config.guide, mask=picture(tmp_path / "mask.png", mask))))
    plain = images_of(ask("unconditional"))
    above, below = (
        error(masked[:, part], smooth()[part_of_target]) / error(plain[:, part], smooth()[part_of_target])
        for part, part_of_target in ((slice(0, 32), slice(0, 8)), (slice(32, 64), slice(8, 16)))
    )
    assert above < 0.9 * below


def test_images_without_a_guide_are_what_they_were(ask: Any) -> None:
    config = ask("text", prompt=("a red star",))
    assert (images_of(config) == images_of(replace(config, guide=GuideConfig()))).all()


# --------------------------------------------------------------------------------------------------------------------
# What is refused, before weights are read


def no_weights(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights were read")


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("unconditional", (20, 20), r"guide.target=t.png has 20 x 20 pixels, of which 64 x 64 is no multiple by one"),
        ("unconditional", (16, 32), "has 32 x 16 pixels"),
        ("unconditional", (128, 128), "has 128 x 128 pixels"),
    ],
)
def test_a_target_of_another_size_is_refused(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: tuple[int, int], words: str
) -> None:
    monkeypatch.setattr(sample, "load_trained", no_weights)
    url = picture(tmp_path / "t.png", pixels(*target))
    with pytest.raises(ConfigError, match=words):
        sample.sample_rows(ask(name, guide=GuideConfig(image=1.0, target=(url,))))


def test_masks_and_targets_that_do_not_fit_are_refused(
    ask: Any, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "load_trained", no_weights)
    white = picture(tmp_path / "white.png", np.full((64, 64), 255, np.uint8))
    black = picture(tmp_path / "black.png", np.zeros((16, 16), np.uint8))
    deep = picture(tmp_path / "deep.png", np.zeros((16, 16), np.uint16))
    larger = picture(tmp_path / "larger.png", pixels(32, 32))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mask": white}, "guide.mask=white.png has 64 x 64 pixels and the target 16 x 16"),
        ({"mask": black}, "guide.mask=black.png is black, so that nothing would count"),
        ({"target": (deep,)}, "guide.target=deep.png has more than 8 bits a channel"),
        ({"target": (str(tmp_path / "none.png"),)}, "there is no such file"),
        ({"target": (small, larger)}, "targets of several sizes, 2 and 4 times smaller"),
    ]
    for keys, words in cases:
        guide = GuideConfig(image=1.0, **{"target": (small,), **keys})
        with pytest.raises(ConfigError, match=words):
            sample.sample_rows(ask("unconditional", guide=guide))


def test_clip_needs_a_cache_that_was_made_with_it(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "load_trained", no_weights)
    with pytest.raises(ConfigError, match="was trained on a cache without captions, so it has no CLIP"):
        sample.sample_rows(ask("captionless", guide=GuideConfig(clip=1.0), prompt=("a red circle",)))


def test_a_classifier_of_other_latents_noise_or_classes_is_refused(
    ask: Any, folder: Path, classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "load_trained", no_weights)
    monkeypatch.setattr(rows_module, "load_classifier", no_weights)
    own = asked.contract()
    others: dict[str, tuple[Any, str]] = {
        "scale": (make_classifier(tmp_path / "scale", replace(own, scale=0.5)), "scale: 0.5, not"),
        "vae": (make_classifier(tmp_path / "vae", replace(own, vae_sha256="c" * 64)), "vae_sha256: cccccccccccc, not"),
        "betas": (
            make_classifier(tmp_path / "betas", own, DiffusionConfig(beta_end=0.02)),
            "was trained on other noise levels: beta_end: 0.02, not 0.012",
        ),
        "flow": (
            make_classifier(tmp_path / "flow", own, DiffusionConfig(prediction="flow")),
            "was trained on other noise levels: process: flow, not discrete",
        ),
        "classes": (
            make_classifier(
                tmp_path / "classes", replace(own, conditions=replace(own.conditions, classes=ClassFacts(count=7)))
            ),
            "knows other classes than the run's cache: 7, not 9",
        ),
    }
    for run, words in others.values():
        with pytest.raises(ContractMismatch, match=words):
            sample.sample_rows(ask("unconditional", guide=GuideConfig(classifier=1.0, run=run), class_=("3",)))
    diffusion = ask("unconditional").run
    with pytest.raises(RunError, match="is not the run of a classifier"):
        sample.sample_rows(ask("unconditional", guide=GuideConfig(classifier=1.0, run=diffusion), class_=("3",)))
    with pytest.raises(ConfigError, match="11"):
        sample.sample_rows(ask("unconditional", guide=GuideConfig(classifier=1.0, run=classifier), class_=("11",)))
    v = DiffusionConfig(prediction="v")  # the same x_t
    guide = GuideConfig(classifier=1.0, run=make_classifier(tmp_path / "v", own, v))
    with pytest.raises(AssertionError, match="weights were read"):
        sample.sample_rows(ask("unconditional", guide=guide, class_=("3",)))


@pytest.mark.parametrize("keys", [{"prompt": ("a red circle",)}, {"class_": ("3",)}])
def test_what_no_guide_asks_for_is_refused_as_before(ask: Any, keys: dict[str, Any]) -> None:
    with pytest.raises(LatentmillError, match="a model of task=unconditional takes no"):
        sample.sample_rows(ask("unconditional", **keys))


def test_packed_weights_are_an_error_and_no_picture(ask: Any, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ask("unconditional", guide=GuideConfig(image=1.0, target=(small,)))
    denoiser = load_trained(config.run).denoiser(None, packed=True)
    monkeypatch.setattr(trained.Trained, "denoiser", lambda *_, **__: denoiser)
    with pytest.raises(RunError, match="weights that are packed for prediction have no gradients"):
        sample.sample_rows(config)
