"""Figures agree with the packages that the field quotes: torch-fidelity, pytorch-fid, clean-fid and open_clip.

All sides have the same Inception weights, seeded and random: the trained ones are not to be had without a network, and
arithmetic does not know the difference. Where a package downloads weights by itself, that download alone is replaced.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from made.encoders import make_sources
from pipeline.config import EncodersConfig
from pipeline.errors import WeightsError
from pipeline.evaluation.features.inception import Inception
from pipeline.evaluation.features.networks import Features, load_features
from pipeline.evaluation.measure import clip_scores
from pipeline.evaluation.metrics.fid import Gaussian, Statistics, fid, inception_score
from pipeline.evaluation.metrics.kernels import kid
from pipeline.evaluation.metrics.manifold import precision_recall
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from preprocess.shapes.drawing import render, scene

declare_torchvision_ops()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages' own imports
    import cleanfid.fid
    import cleanfid.inception_pytorch
    import cleanfid.resize
    import open_clip
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    import torch_fidelity
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_isc
    import torch_fidelity.metric_kid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

QUIET = pytest.mark.filterwarnings("ignore")  # scipy's and numpy's deprecations in the packages


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in pytorch-fid's layout, the hash of its bytes at the end of its name."""
    network = Inception()
    network.randomize(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def pictures(count: int, seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Captioned shapes with noise on them: (N, H, W, 3) uint8."""
    draw = np.random.default_rng(seed)
    shapes = np.stack([render(scene(seed, i)) for i in range(count)])
    scaled = np.stack([np.asarray(Image.fromarray(shape).resize((width, height))) for shape in shapes])
    return (scaled.astype(int) + draw.integers(-40, 40, scaled.shape)).clip(0, 255).astype(np.uint8)


def gaussian(x: Tensor) -> Gaussian:
    """As the packages have it, from numpy: ours are sums on a grid."""
    return Gaussian(len(x), x.mean(0), torch.from_numpy(np.cov(x.numpy(), rowvar=False)))


def full_rank(count: int, width: int, seed: int) -> Tensor:
    """Correlated features whose covariances differ, not negative, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return (torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 0.2).relu()


# --------------------------------------------------------------------------------------------------------------------
# From the same features: 1e-6


@QUIET
@pytest.mark.parametrize(
    ("count", "width"), [(900, 192), pytest.param(3000, 2048, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_fid_of_the_same_features_is_the_packages(count: int, width: int) -> None:
    x, y = full_rank(count, width, 1), full_rank(count + 100, width, 2)
    ours = fid(Statistics.of(x).gaussian(), Statistics.of(y).gaussian())
    statistics = [torch_fidelity.metric_fid.fid_features_to_statistics(side) for side in (x, y)]
    fidelity = torch_fidelity.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert ours == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-6)
    (m_x, s_x), (m_y, s_y) = ((side["mu"], side["sigma"]) for side in statistics)
    assert ours == pytest.approx(pytorch_fid.fid_score.calculate_frechet_distance(m_x, s_x, m_y, s_y), rel=1e-6)
    assert ours == pytest.approx(cleanfid.fid.fid_from_feats(x.numpy(), y.numpy()), rel=1e-6)
    assert ours == pytest.approx(fid(gaussian(x), gaussian(y)), rel=1e-6) and ours > 1


def test_kid_of_the_same_features_is_the_packages() -> None:
    x, y = full_rank(300, 192, 1), full_rank(350, 192, 2)
    found = torch_fidelity.metric_kid.kid_features_to_metric(
        x, y, kid_subsets=20, kid_subset_size=100, rng_seed=2020, verbose=False
    )
    expected = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    assert kid(x, y, subsets=20, size=100) == pytest.approx(expected, rel=1e-6)
    whole, _ = kid(
        x, y[:300], subsets=1, size=300
    )  # clean-fid draws its subsets from numpy's global state: all of them
    assert whole == pytest.approx(cleanfid.fid.kernel_distance(x.numpy(), y[:300].numpy(), 1, 300), rel=1e-6)


def test_inception_score_of_the_same_features_is_torch_fidelitys() -> None:
    x = full_rank(333, 64, 1)
    classes = torch.randn(50, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch_fidelity.metric_isc.isc_features_to_metric(x @ classes.T)
    expected = found["inception_score_mean"], found["inception_score_std"]
    assert inception_score(x, classes) == pytest.approx(expected, rel=1e-6) and expected[0] > 2


def test_precision_and_recall_of_the_same_features_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = full_rank(200, 8, 1) + 0.5, 1.5 * full_rank(150, 8, 4)
    found = calculate_precision_recall_full(x, y)
    assert precision_recall(x, y) == pytest.approx(found, abs=1e-6) and 0.05 < min(found) < max(found) < 1


# --------------------------------------------------------------------------------------------------------------------
# Features of each resize: 1e-4


def theirs(resize: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], Tensor]:
    """The package's features of pictures (N, H, W, 3) uint8 of one size."""

    def downloaded(*_: Any, **__: Any) -> dict[str, Tensor]:
        return torch.load(weights, weights_only=True)

    if resize == "tensorflow":
        fidelity = FeatureExtractorInceptionV3("ours", ["2048"], str(weights))
        return lambda images: fidelity(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
    if resize == "pytorch":
        monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", downloaded)
        mseitzer = pytorch_fid.inception.InceptionV3([3]).eval()
        return lambda images: mseitzer(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)[0].flatten(1)
    resizer, network = cleanfid.resize.build_resizer("clean"), Inception()
    network.load_state_dict(downloaded())

    def clean(images: np.ndarray) -> Tensor:
        resized = np.stack([resizer(image) for image in images])
        return network.eval()((torch.from_numpy(resized).permute(0, 3, 1, 2) - 128) / 128)

    return clean


@QUIET
@pytest.mark.parametrize(("name", "resize"), [("inception", "tensorflow"), ("inception_pytorch", "pytorch")])
@pytest.mark.parametrize("size", [(64, 64), (333, 450)])
def test_inception_features_are_the_packages(
    name: str, resize: str, size: tuple[int, int], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(load_features(name, weights=str(weights)), theirs(resize, weights, monkeypatch), size)


@QUIET
@pytest.mark.parametrize("size", [(64, 64), (333, 450), (299, 299)])
def test_features_after_clean_fids_resizer_are_its(
    size: tuple[int, int], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(load_features("inception_clean", weights=str(weights)), theirs("clean", weights, monkeypatch), size)


def compare(ours: Features, their: Callable[[np.ndarray], Tensor], size: tuple[int, int]) -> None:
    images = pictures(2, 3, *size)
    found = ours(images)
    with torch.no_grad():
        expected = their(images)
    assert found.shape == expected.shape == (2, 2048) and float(expected.std()) > 0.01
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((found[0] - found[1]).abs().max()) > 0.01 * float(expected.abs().max())  # they tell pictures apart


def test_the_resizes_are_three_different_ones(weights: Path) -> None:
    images = pictures(1, 3)
    found = [
        load_features(name, weights=str(weights))(images)
        for name in ("inception", "inception_pytorch", "inception_clean")
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float((found[i] - found[j]).abs().max()) > 1e-3 * float(found[i].abs().max())


# --------------------------------------------------------------------------------------------------------------------
# End to end: 1e-3


class Pictures(torch.utils.data.Dataset):
    """Pictures as torch-fidelity wants them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)


@QUIET
@pytest.mark.parametrize("frechet", [False, pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_figures_of_the_same_pictures_are_torch_fidelitys(frechet: bool, weights: Path) -> None:
    """Without FID in few seconds: torch-fidelity takes the eigenvalues of a general matrix of 2048."""
    sides = pictures(12, 1), pictures(10, 2)
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(sides[0]),
        input2=Pictures(sides[1]),
        feature_extractor_weights_path=str(weights),
        cuda=False,
        batch_size=6,
        fid=frechet,
        kid=True,
        isc=True,
        kid_subset_size=8,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    features = load_features("inception", weights=str(weights))
    x, y = (torch.cat([features(part) for part in np.array_split(side, 2)]) for side in sides)
    assert features.classes is not None
    if frechet:
        found = fid(Statistics.of(x).gaussian(), Statistics.of(y).gaussian())
        assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    kernel = expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"]
    assert kid(x, y, size=8) == pytest.approx(kernel, rel=1e-3)
    score = expected["inception_score_mean"], expected["inception_score_std"]
    assert inception_score(x, features.classes) == pytest.approx(score, rel=1e-3)


@QUIET
@pytest.mark.long
@pytest.mark.timeout(900)
def test_figures_of_the_same_folders_are_pytorch_fids_and_clean_fids(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(tmp_path / name) for name in "xy"]
    sides = pictures(24, 1, 80, 100), 255 - pictures(24, 2, 80, 100)  # so far apart that KID is no difference of equals
    for folder, side in zip(folders, sides, strict=True):
        Path(folder).mkdir()
        for i, image in enumerate(side):
            Image.fromarray(image).save(f"{folder}/{i:03d}.png")
    their = theirs("pytorch", weights, monkeypatch)
    found = [load_features("inception_pytorch", weights=str(weights))(side) for side in sides]
    expected = pytorch_fid.fid_score.calculate_fid_given_paths(folders, 12, "cpu", 2048, num_workers=0)
    assert fid(*(Statistics.of(x).gaussian() for x in found)) == pytest.approx(expected, rel=1e-3)
    their = theirs("clean", weights, monkeypatch)

    def model(batch: Tensor) -> Tensor:  # what clean-fid's own resizer gave, (N, 3, 299, 299) of 0 to 255
        return their(batch.permute(0, 2, 3, 1).numpy())

    kernel = [
        cleanfid.fid.get_folder_features(
            folder, model, num_workers=0, batch_size=12, device=torch.device("cpu"), mode="clean", verbose=False
        )
        for folder in folders
    ]
    found = [load_features("inception_clean", weights=str(weights))(side) for side in sides]
    whole, _ = kid(found[0], found[1], subsets=1, size=24)
    assert whole > 0.01
    assert whole == pytest.approx(cleanfid.fid.kernel_distance(*kernel, 1, 24), rel=1e-3)
    assert fid(*(Statistics.of(x).gaussian() for x in found)) == pytest.approx(
        cleanfid.fid.fid_from_feats(*kernel), rel=1e-3
    )


def test_clip_score_is_open_clips_own(tmp_path: Path) -> None:
    folder = make_sources(tmp_path) / "ViT-L-14"
    images, captions = pictures(5, 1, 50, 70), [scene(1, i).caption for i in range(5)]
    tower = load_text(EncodersConfig(text=str(folder), text_length=77, text_pad=0))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([transform(Image.fromarray(one)) for one in images]))
        text = model.encode_text(tokens)
    expected = 100 * torch.nn.functional.cosine_similarity(image.double(), text.double())
    torch.testing.assert_close(clip_scores(tower, images, captions), expected, rtol=1e-6, atol=1e-5)
    assert float(expected.std()) > 0.01


# --------------------------------------------------------------------------------------------------------------------
# Weights


def test_weights_are_held_to_the_hash_in_their_name_or_url(weights: Path, tmp_path: Path) -> None:
    import hashlib

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    named = tmp_path / f"inception-{digest[:8]}.pth"
    named.symlink_to(weights)
    wrong = tmp_path / "inception-0123abcd.pth"
    wrong.symlink_to(weights)
    plain = load_features("inception", weights=str(weights))
    assert load_features("inception", weights=str(named)).sha256 == plain.sha256
    assert load_features("inception", weights=f"{weights}#sha256={digest}").sha256 == plain.sha256
    for source in (str(wrong), f"{weights}#sha256={'0' * 64}"):
        with pytest.raises(WeightsError, match="damaged, or another one"):
            load_features("inception", weights=source)
    with pytest.raises(WeightsError, match="no such file"):
        load_features("inception", weights=str(tmp_path / "none.pth"))
