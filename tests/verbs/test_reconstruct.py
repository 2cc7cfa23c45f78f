"""latentmill reconstruct: the shipped autoencoder on captioned shapes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made.autoencoder_run import make_pixels
from made.cache import make_cache
from made.first_stages import vq_folder
from pipeline import cli
from pipeline.evaluation.reconstruction.card import parse_card
from pipeline.evaluation.reconstruction.evaluate import Reconstructing
from preprocess.shapes.shards import write_shards

IMAGES = 48


def refusal(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """Runs a command line, asserts its exit status, and returns its only line of stderr."""
    capsys.readouterr()
    assert cli.main(list(words)) == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned shapes as pixels, as PNGs, and beside latents."""
    folder = tmp_path_factory.mktemp("reconstruct")
    write_shards(str(folder / "shapes"), IMAGES, 1, "val", shard_size=IMAGES // 2)
    common = ["encode", f"source={folder}/shapes/*.tar", "decode_in=threads", "launch.threads=1"]
    assert cli.main([*common, f"dest={folder}/pixels", "stored=pixels"]) == 0
    assert cli.main([*common, f"dest={folder}/png", "stored=pixels", "pixels=png"]) == 0
    return folder


@pytest.fixture(scope="module")
def demo(folder: Path) -> Path:
    assert cli.main(["reconstruct", f"dataset={folder}/pixels", "encoders=demo", f"dest={folder}/demo", "pairs=5"]) == 0
    return folder / "demo"


def test_the_shipped_autoencoder_reaches_its_quality_on_captioned_shapes(demo: Path) -> None:
    card = parse_card((demo / "card.json").read_bytes())
    assert 33 < card.metrics["psnr"] < 35 and card.metrics["ssim"] > 0.95
    assert 0.8 < 1 / card.metrics["latent_std"] < 1.1  # config.json has the scale that makes it 1
    assert (card.images, card.weights, card.n) == (IMAGES, "given", 0)
    assert card.autoencoder == {
        "architecture": "AutoencoderKL", "downsampling": 8, "channels": 4, "dtype": "float32",
    }  # fmt: skip
    assert "AutoencoderKL, f = 8, 4 channels, weights" in card.line() and "samples" not in card.line()


def test_the_pairs_are_the_worst_ones_first_and_a_page_shows_them(demo: Path) -> None:
    tiles = json.loads((demo / "grid.json").read_text())
    given, grid = (np.asarray(Image.open(demo / f"{name}.png")).astype(float) for name in ("given", "grid"))
    found = [
        10 * np.log10(255**2 / np.square(given[:, left : left + 64] - grid[:, left : left + 64]).mean())
        for left in range(0, 5 * 66, 66)
    ]
    assert found == sorted(found) and len(found) == 5
    assert [f"{value:.1f} dB" for value in found] == [caption.split(": ")[1] for caption in tiles["captions"]]
    assert max(found) < parse_card((demo / "card.json").read_bytes()).metrics["psnr"]
    html = (demo / "report.html").read_text()
    assert "Worst reconstructions" in html and tiles["captions"][0] in html and "A scale of" in html
    with Image.open(demo / "pairs.png") as pairs:
        assert pairs.size[0] > 2 * 128


def test_pixels_that_are_stored_as_pngs_give_the_same_figures(folder: Path, demo: Path) -> None:
    assert cli.main(["reconstruct", f"dataset={folder}/png", "encoders=demo", f"dest={folder}/of_png"]) == 0
    first, second = (parse_card((place / "card.json").read_bytes()) for place in (demo, folder / "of_png"))
    for name in ("psnr", "psnr_error", "ssim", "kl_bits_per_pixel", "latent_std"):
        assert first.metrics[name] == second.metrics[name]
    assert first.pictures["dataset"] != second.pictures["dataset"]


def test_an_evaluation_that_is_there_is_not_made_again_and_another_is_refused(
    folder: Path, demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (demo / "report.html").unlink()
    monkeypatch.setattr(Reconstructing, "__call__", lambda *_, **__: pytest.fail("it was made again"))
    command = ["reconstruct", f"dataset={folder}/pixels", "encoders=demo", f"dest={demo}"]
    assert cli.main(command) == 0
    assert (demo / "report.html").exists()
    said = refusal(capsys, 1, *command, "images=20")
    assert f"dest={demo} holds another evaluation (images: {IMAGES} on the card, 20 here)" in said
    assert "pictures: " in refusal(capsys, 1, command[0], f"dataset={folder}/png", *command[2:])


def test_an_interrupted_evaluation_is_made_anew(folder: Path, tmp_path: Path) -> None:
    command = ["reconstruct", f"dataset={folder}/pixels", "encoders.vae=pixels", f"dest={tmp_path}/out", "images=4"]
    assert cli.main(command) == 0
    whole = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert whole["psnr"] == 100
    (tmp_path / "out" / "metrics.json").unlink()
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["psnr"] == 100
    for name in ("metrics.json", "card.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    assert cli.main(command) == 0


def test_a_codebook_of_diffusers_is_measured(tmp_path: Path) -> None:
    make_pixels(str(tmp_path / "pixels"), [6])
    vae = vq_folder(tmp_path / "vq")
    assert cli.main(["reconstruct", f"dataset={tmp_path}/pixels", f"encoders.vae={vae}", f"dest={tmp_path}/out"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["bits_per_pixel"] == 5 / 2**2 and 1 <= metrics["perplexity"] <= 32 * metrics["codes_used"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "codes used" in html and "bits a pixel" in html


def test_what_cannot_be_reconstructed_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cache(str(tmp_path / "latents"), [2])
    make_pixels(str(tmp_path / "odd"), [2], side=12)
    to = [f"dest={tmp_path}/out", "encoders=demo"]
    said = refusal(capsys, 1, "reconstruct", f"dataset={tmp_path}/latents", *to)
    assert f"dataset={tmp_path}/latents holds latents and no pictures to compare with: give a cache of encode " in said
    said = refusal(capsys, 1, "reconstruct", f"dataset={tmp_path}/odd", *to)
    assert "has pictures of 12 x 12 pixels, and the autoencoder takes multiples of 8" in said
    said = refusal(capsys, 1, "reconstruct", f"dataset={folder}/pixels", *to, "perceptual=")
    assert "perceptual= is empty" in said
    said = refusal(capsys, 1, "reconstruct", f"dataset={folder}/pixels", *to, "features_weights=x.pth")
    assert "features_weights is given without reference" in said
    assert not (tmp_path / "out").exists()


def test_a_place_that_holds_something_else_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reconstruct", f"dataset={folder}/pixels", "encoders=demo"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "is not empty, and holds no evaluation" in refusal(capsys, 1, *command, f"dest={tmp_path}/mine")
    assert "is a file: name a folder" in refusal(capsys, 1, *command, f"dest={tmp_path}/mine/thesis.tex")
    (tmp_path / "mine" / "card.json").write_text("{}")
    assert "is no card of an autoencoder" in refusal(capsys, 1, *command, f"dest={tmp_path}/mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"thesis.tex", "card.json"}
