"""LPIPS with VGG-16: its distances and gradients against torch-fidelity's own code, and what weights it takes.

torch-fidelity downloads a backbone and heads; here both have the same made-up weights on its side and on ours.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from made.stlpips_golden import pairs, seeded, uniform
from pipeline.config.tasks.figures import LPIPS, ST_LPIPS
from pipeline.errors import LatentmillError, ShapeError, WeightsError
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.perceptual.loaded import from_tensors, load_perceptual, lpips_from_tensors
from pipeline.models.perceptual.network import Perceptual

declare_torchvision_ops()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package's own imports
    from torch_fidelity import sample_similarity_lpips as fidelity


@cache
def weights() -> Mapping[str, Tensor]:
    """A file's tensors, under the names of the package lpips."""
    return seeded("lpips-vgg")


def network() -> Perceptual:
    return lpips_from_tensors(weights(), "made")


def vgg16() -> nn.Sequential:
    """torchvision's `features` of VGG-16: configuration D of Simonyan and Zisserman 2015."""
    layers: list[nn.Module] = []
    width = 3
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for out in widths:
            layers += [nn.utils.skip_init(nn.Conv2d, width, out, 3, padding=1), nn.ReLU(inplace=True)]
            width = out
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """torch-fidelity's LPIPS with our weights in place of its downloads."""
    heads = {name: tensor for name, tensor in weights().items() if name.startswith("lin")}
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: heads)
    monkeypatch.setattr(fidelity, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=vgg16()))
    theirs = fidelity.SampleSimilarityLPIPS("lpips-vgg16")
    theirs.load_state_dict(weights())
    return theirs.eval()


def in_levels(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as torch-fidelity wants them, in [0, 255]."""
    return (x + 1) * 127.5


# --------------------------------------------------------------------------------------------------------------------
# Distances


def test_distances_are_those_of_torch_fidelitys_lpips(peer: nn.Module) -> None:
    """On noise and on blocks, also of odd sizes, whose last row and column no window reaches."""
    ours = network()
    with torch.no_grad():
        for x, y in pairs():
            theirs = peer(in_levels(x), in_levels(y)).flatten().tolist()
            assert ours.distance(x, y).tolist() == pytest.approx(theirs, rel=1e-4)
            assert min(theirs) > 0.01


def test_gradients_are_those_of_torch_fidelitys_lpips(peer: nn.Module) -> None:
    """On noise: where values of a window are equal, as in flat pictures, PyTorch's goes to the first, ours to all."""
    x, y = (torch.from_numpy(uniform(seed, 2, 3, 40, 33)) for seed in (1, 2))
    ours = network()
    found = []
    for distance in (lambda a: ours.distance(a, y), lambda a: peer(in_levels(a), in_levels(y))):
        a = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(a).sum(), a)
        found.append(gradient)
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm() and found[1].norm() > 0


def test_it_is_another_distance_than_st_lpips_and_says_so() -> None:
    ours, tolerant = network(), Perceptual("vgg")
    tolerant.load_state_dict(ours.state_dict())  # of equal shapes
    x, y = pairs()[0]
    with torch.no_grad():
        assert not torch.allclose(ours.distance(x, y), tolerant.distance(x, y), rtol=0.05)
    assert (ours.name, ours.figure) == ("lpips-vgg", LPIPS)
    assert (tolerant.name, tolerant.figure) == ("st-vgg", ST_LPIPS)
    with pytest.raises(ShapeError, match="32 pixels or more along a side, and these have 31"):
        ours.distance(x[..., :31], y[..., :31])


# --------------------------------------------------------------------------------------------------------------------
# Weights


def stored(folder: Path, tensors: Mapping[str, Tensor], name: str = "lpips_vgg.safetensors") -> Path:
    path = folder / name
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def loaded(path: str | Path) -> Perceptual:
    found = load_perceptual(f"lpips-vgg:{path}")
    assert found is not None
    return found


def refusal(source: str | Path, kind: str = "lpips-vgg:") -> str:
    with pytest.raises(LatentmillError) as refused:
        load_perceptual(f"{kind}{source}", key="loss.perceptual")
    assert isinstance(refused.value, WeightsError) and "\n" not in str(refused.value)
    return str(refused.value)


def of_the_package() -> dict[str, Tensor]:
    """All that LPIPS(net="vgg").state_dict() of the package lpips holds: heads are there twice."""
    twice = {name.replace("lin", "lins.", 1): tensor.clone() for name, tensor in weights().items() if "lin" in name}
    shift, scale = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    scaling = {"shift": torch.tensor(shift).reshape(1, 3, 1, 1), "scale": torch.tensor(scale).reshape(1, 3, 1, 1)}
    return dict(weights()) | twice | {f"scaling_layer.{name}": tensor for name, tensor in scaling.items()}


def of_torchvision() -> dict[str, Tensor]:
    """torchvision's VGG-16, with its classifier, and the heads of vgg.pth beside it."""
    backbone = {f"features.{name.split('.', 2)[2]}": tensor for name, tensor in weights().items() if "net" in name}
    heads = {name: tensor for name, tensor in weights().items() if name.startswith("lin")}
    return backbone | heads | {"classifier.6.bias": torch.zeros(1000)}


def test_files_of_lpips_of_taming_and_of_torchvision_with_heads_hold_the_same_network(tmp_path: Path) -> None:
    """taming-transformers' LPIPS has the package's names without the second heads."""
    digests = {loaded(stored(tmp_path, of)).sha256 for of in (weights(), of_the_package(), of_torchvision())}
    torch.save(of_the_package(), tmp_path / "lpips_vgg.pth")
    digests.add(loaded(tmp_path / "lpips_vgg.pth").sha256)
    assert digests == {network().sha256}


def test_a_file_is_held_to_its_hash(tmp_path: Path) -> None:
    path = stored(tmp_path, weights())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded(f"{path}#sha256={digest}").sha256 == network().sha256
    refused = refusal(f"{path}#sha256={'0' * 64}")
    assert refused.startswith(f"loss.perceptual=lpips-vgg:{path}#sha256=000") and "its SHA-256 begins with" in refused
    assert refusal(tmp_path / "no.pth") == f"loss.perceptual=lpips-vgg:{tmp_path}/no.pth: there is no such file"


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights().items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (without("net"), "holds LPIPS' heads alone: put VGG-16 into the same file"),
        (without("lin"), "holds VGG-16 alone: put LPIPS' heads into the same file"),
        (without("net.slice5.28.bias"), "LPIPS with VGG-16: net.slice5.28.bias is missing"),
        (without("lin3"), "lin3.model.1.weight is missing"),
        ({"a": torch.zeros(1)}, "is missing"),
        (dict(weights()) | {"net.slice6.1.weight": torch.zeros(1)}, "net.slice6.1.weight is no part of it"),
        (dict(weights()) | {"lin0.model.1.weight": torch.zeros(64)}, "not (1, 64, 1, 1)"),
        (dict(weights()) | {"net.slice1.0.weight": torch.zeros(64, 3, 11, 11)}, "not (64, 3, 3, 3)"),
        (dict(weights()) | {"net.slice1.0.bias": torch.full((64,), torch.inf)}, "net.slice1.0.bias holds NaN"),
        (of_the_package() | {"lins.0.model.1.weight": torch.zeros(1, 64, 1, 1)}, "lin0.model.1.weight twice"),
        (of_the_package() | {"scaling_layer.scale": torch.ones(1, 3, 1, 1)}, "scaling_layer.scale has other values"),
        (dict(seeded("vgg")), "holds st-LPIPS, and not LPIPS: give it without lpips-vgg:"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_of_another_network_are_refused_by_what_differs(tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(WeightsError) as refused:
        lpips_from_tensors(tensors, "loss.perceptual=lpips-vgg:made")
    said = str(refused.value)
    assert said.startswith("loss.perceptual=lpips-vgg:made") and says in said and "\n" not in said


def test_lpips_is_not_taken_for_st_lpips(tmp_path: Path) -> None:
    path = stored(tmp_path, of_the_package())
    assert refusal(path, "").endswith("holds LPIPS with VGG-16, and not st-LPIPS: give it as lpips-vgg:FILE")
    with pytest.raises(WeightsError, match="or LPIPS as lpips-vgg:FILE"):
        from_tensors(of_torchvision(), "made")


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dict(weights()) | {"x": Harmful()}, tmp_path / "lpips_vgg.pth")
    assert "cannot be read as tensors alone" in refusal(tmp_path / "lpips_vgg.pth")
    assert "it ran" not in capsys.readouterr().out


def test_its_loss_descends_from_noise(peer: nn.Module) -> None:
    """A step along our gradient makes torch-fidelity's distance smaller."""
    x, y = (torch.from_numpy(uniform(seed, 2, 3, 32, 32)) for seed in (1, 2))
    x.requires_grad_()
    before = network().distance(x, y).sum()
    (gradient,) = torch.autograd.grad(before, x)
    with torch.no_grad():
        after = peer(in_levels(x - gradient / gradient.norm()), in_levels(y)).sum()
    assert after < 0.98 * before.detach()
