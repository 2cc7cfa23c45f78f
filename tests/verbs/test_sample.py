"""latentmill sample: a picture with captions of any script, and images that depend on their number alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made.run import SAMPLER, make_cache, make_run
from pipeline import sample
from pipeline.config import EncodersConfig, SampleConfig, UnconditionalTask
from pipeline.config.loading.load import load
from pipeline.errors import ConfigError, ContractMismatch, RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    make_cache(folder)
    make_run(folder, kept={"power-0.1": 3.0})
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> SampleConfig:
    return SampleConfig(run=str(folder / "run"), n=2, dest=str(tmp_path / "new" / "out.png"), sampler=SAMPLER)


def rows_of(config: SampleConfig, prompts: list[str]) -> list[np.ndarray]:
    """Images of each prompt, (n, H, W, 3) uint8."""
    return [row.images for row in sample.sample_rows(replace(config, prompt=tuple(prompts)))]


def sample_images(config: SampleConfig, prompts: list[str]) -> np.ndarray:
    """Images of one size: (prompts, n, H, W, 3) uint8."""
    return np.stack(rows_of(config, prompts))


def test_picture_has_a_row_for_each_caption_of_any_script(config: SampleConfig) -> None:
    prompts = ("a red circle", "一个大红圆", "دائرة {حمراء} 'x'", "a 🔴 " * 60)
    assert sample.main(replace(config, prompt=prompts)) == 0
    with Image.open(config.dest) as picture:
        assert picture.width == 2 * 128 + 2 + 24 and picture.height > 4 * 128


def test_images_depend_on_their_number_and_the_seed_alone(config: SampleConfig) -> None:
    prompts = ["a red circle", "a blue box", "a red circle"]
    whole = sample_images(config, prompts)
    other = sample_images(replace(config, sampler=replace(SAMPLER, batch=2)), prompts)
    assert whole.shape == (3, 2, 64, 64, 3)
    assert np.abs(whole.astype(int) - other.astype(int)).max() <= 1
    assert (whole[0] != whole[2]).any()  # same caption, other noise
    assert (whole != sample_images(replace(config, seed=1), prompts)).any()


def test_guidance_shorthand_is_the_samplers(config: SampleConfig) -> None:
    short, long, none = (
        sample_images(one, ["a red circle"])
        for one in (
            replace(config, guidance=5.0),
            replace(config, sampler=replace(SAMPLER, guidance=5.0)),
            replace(config, guidance=1.0),
        )
    )
    assert (short == long).all() and (short != none).any()


def test_another_average_of_the_run_is_taken_by_its_width(config: SampleConfig) -> None:
    own, other = (sample_images(replace(config, ema=ema), ["a red circle"]) for ema in (0.0, 0.1))
    assert (own != other).any()
    with pytest.raises(RunError, match=r"ema=1000: .*keeps no such average \(it has 0.1\)"):
        sample_images(replace(config, ema=1000.0), ["a red circle"])


def test_other_encoders_are_refused(config: SampleConfig) -> None:
    with pytest.raises(ContractMismatch, match="encoders="):
        sample.main(replace(config, encoders=EncodersConfig(seed=2)))


def test_no_images_is_refused(config: SampleConfig) -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        sample.main(replace(config, n=0))


def test_unconditional_run_takes_no_prompt(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(folder / "cache")
    run = make_run(tmp_path, task=UnconditionalTask()).run
    config = SampleConfig(run=run, n=3, dest=str(tmp_path / "out.png"), sampler=replace(SAMPLER, guidance=1.0))
    with pytest.raises(ConfigError, match="takes no prompt"):
        sample.main(replace(config, prompt=("a circle",)))
    assert sample.main(config) == 0


def test_a_caption_longer_than_the_context_is_said_and_its_rest_not_read(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = SampleConfig(run=str(folder / "run"), n=1, sampler=SAMPLER, device="cpu")
    short = "a large red circle left of a small blue square"
    long = " ".join([short] * 8)
    pictures = sample_images(config, [short, long])
    told = capsys.readouterr().err
    assert (
        "'a large red circle left of a small blue ...' has 82 tokens with start and end, and the model reads 32" in told
    )
    assert told.count("the model reads") == 1
    longer = sample_images(config, [short, long + " and a green cross"])
    assert (longer == pictures).all()


def test_sizes_may_be_mixed_and_each_image_is_what_it_is_alone(config: SampleConfig) -> None:
    prompts = ["a red circle", "a blue box", "a green cross"]
    mixed = rows_of(replace(config, size=("64x64", "96x32", "64x64")), prompts)
    assert [row.shape for row in mixed] == [(2, 64, 64, 3), (2, 32, 96, 3), (2, 64, 64, 3)]
    plain = rows_of(config, prompts)
    wide = rows_of(replace(config, size=("96x32",)), prompts)
    for got, alone in ((mixed[0], plain[0]), (mixed[1], wide[1]), (mixed[2], plain[2])):
        assert np.abs(got.astype(int) - alone.astype(int)).max() <= 1
    assert sample.main(replace(config, prompt=tuple(prompts), size=("64x64", "96x32", "64x64"))) == 0
    with Image.open(config.dest) as picture:
        assert picture.width == 2 * 192 + 2 + 24  # 96 pixels are shown twice as large


def test_a_size_that_the_model_cannot_make_is_refused(config: SampleConfig) -> None:
    with pytest.raises(ConfigError, match="size=100x64: this model makes multiples of 16 pixels; the nearest is 96x64"):
        rows_of(replace(config, size=("100x64",)), ["a red circle"])


def test_a_negative_prompt_takes_the_empty_captions_place(config: SampleConfig) -> None:
    prompts = ["a red circle"]
    plain = sample_images(config, prompts)
    away = sample_images(replace(config, negative="a blue box"), prompts)
    assert (plain != away).any()
    same = sample_images(replace(config, negative="a red circle"), prompts)
    alone = sample_images(replace(config, guidance=1.0), prompts)
    assert np.abs(same.astype(int) - alone.astype(int)).max() <= 1  # away from itself: guidance is none


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["negative=a box", "guidance=1"], "negative is given but guidance=1"),
        (["size=64"], "size=64: width and height"),
        (["size=[64x64,64x64]", "prompt=a", "prompt=b", "prompt=c"], "size: 2 for 3 rows"),
        (["sampler.guidance_low=2", "sampler.guidance_high=1"], "sampler.guidance_low=2, guidance_high=1"),
        (["sampler.rescale=0.7", "sampler.guidance=1"], "sampler.rescale without guidance"),
        (["sampler.rescale=1.5"], "sampler.rescale=1.5"),
        (["sampler.sampler=magic"], "ddim, dpmpp_2m, euler, heun, unipc"),
        (["weights=raw", "ema=0.1"], "weights=raw with ema=0.1: leave one of them out"),
        (["ema=0.5"], "ema=0.5 is neither a relative width (above 0 and below 0.28) nor a half-life"),
    ],
)
def test_what_cannot_go_together_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("sample", ["run=runs/a", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=[10,10]"], "steps=[10,10]: one is given twice"),
        (["sampler=[]"], "sampler=[]: one or more"),
        (["guidance=[1]", "guidance_high=4"], "guidance_high without guidance"),
        (["guidance=[-1,2]"], "guidance=-1"),
        (["images=1"], "images=1: 2 or more"),
    ],
)
def test_evaluations_keys_are_held_against_each_other(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load("eval", ["run=runs/a", *words])
    config = load("eval", ["run=runs/a", "guidance=[1,2,3,5,8]", "sampler=[ddim,heun]", "steps=[10,20]"])
    assert config.guidance == (1, 2, 3, 5, 8) and config.sampler == ("ddim", "heun") and config.steps == (10, 20)
