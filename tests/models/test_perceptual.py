"""st-LPIPS: its distances against those of the package stlpips-pytorch, its gradients, and what weights it takes."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from made.stlpips_golden import FILE, KINDS, pairs, seeded, uniform
from pipeline.errors import LatentmillError, ShapeError, WeightsError
from pipeline.models.perceptual import loaded
from pipeline.models.perceptual.loaded import PACKAGE, from_tensors, load_perceptual
from pipeline.models.perceptual.network import SMALLEST, Kind, Perceptual

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


def network(kind: Kind = "alex") -> Perceptual:
    return from_tensors(seeded(kind), "made")


def pictures(seed: int, count: int = 2, side: int = 40) -> Tensor:
    return torch.from_numpy(uniform(seed, count, 3, side, side))


# --------------------------------------------------------------------------------------------------------------------
# Distances


def distances(of: Perceptual) -> list[list[float]]:
    with torch.no_grad():
        return [of.distance(x, y).tolist() for x, y in pairs()]


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_those_of_the_packages_own_code(kind: Kind) -> None:
    """With weights that are functions of seeds, on noise and on blocks, also of odd sizes."""
    for found, golden in zip(distances(network(kind)), GOLDEN["seeded"][kind], strict=True):
        assert found == pytest.approx(golden, rel=1e-5, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_distances_with_published_weights_are_those_of_the_packages_own_code(kind: Kind) -> None:
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        pytest.skip("stlpips-pytorch is not installed: pip install -c constraints.txt '.[perceptual]'")
    of = load_perceptual(f"st-{kind}")
    assert of is not None
    for found, golden in zip(distances(of), GOLDEN["published"][kind], strict=True):
        assert found == pytest.approx(golden, rel=1e-5, abs=1e-6)
    assert "stlpips_pytorch" not in sys.modules


def test_a_distance_is_0_between_equal_pictures_and_the_same_both_ways() -> None:
    of, x, y = network(), pictures(1), pictures(2)
    assert of.distance(x, x).tolist() == [0.0, 0.0]
    assert torch.equal(of.distance(x, y), of.distance(y, x)) and (of.distance(x, y) > 0.1).all()
    each = [of.distance(x[i : i + 1], y[i : i + 1]).item() for i in range(2)]
    assert of.distance(x, y).tolist() == pytest.approx(each, rel=1e-5)


def test_a_distance_is_float32_whatever_the_pictures_are_and_inside_autocast() -> None:
    of, x, y = network(), pictures(1), pictures(2)
    whole = of.distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(of.distance(x, y), whole)
    assert of.distance(x.double(), y).dtype == of.distance(x.bfloat16(), y).dtype == torch.float32
    assert torch.allclose(of.distance(x.bfloat16(), y), whole, rtol=0.02)


def test_pictures_that_are_too_small_or_of_different_sizes_are_refused() -> None:
    of = network()
    of.distance(pictures(1, side=SMALLEST), pictures(2, side=SMALLEST))
    with pytest.raises(ShapeError, match="32 pixels or more along a side, and these have 31"):
        of.distance(pictures(1)[..., :31], pictures(2)[..., :31])
    for other in (pictures(2, side=41), pictures(2, count=1), pictures(2)[:, :1], pictures(2)[0]):
        with pytest.raises(ShapeError, match=r"batches of pictures \(B, 3, H, W\) of one size"):
            of.distance(pictures(1), other)


# --------------------------------------------------------------------------------------------------------------------
# As a loss


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_the_distances_slope_and_reaches_pictures_alone(kind: Kind) -> None:
    of, x, y = network(kind), pictures(1, side=32).requires_grad_(), pictures(2, side=32)
    (gradient,) = torch.autograd.grad(of.distance(x, y).sum(), x)
    step = 2e-3 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (of.distance(x + step, y) - of.distance(x - step, y)).double().sum().item()
    assert rise / 4e-3 == pytest.approx(gradient.norm().item(), rel=0.02)
    assert not any(parameter.requires_grad for parameter in of.parameters())
    assert not of.training and not of.distance(x.detach(), y).requires_grad


def test_a_loss_that_is_descended_makes_pictures_look_alike() -> None:
    of, x, y = network(), pictures(1, side=32), pictures(2, side=32)
    before = of.distance(x, y).sum().item()
    for _ in range(8):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(of.distance(x, y).sum(), x)
        x = x - 2 * gradient / gradient.norm()
    assert of.distance(x, y).sum().item() < 0.9 * before


def test_gradients_are_finite_where_all_features_of_a_position_are_0() -> None:
    tensors = dict(seeded("alex"))
    tensors["net.slice3.9.bias"] = torch.full((384,), -1e6)
    of, x = from_tensors(tensors, "made"), pictures(1).requires_grad_()
    of.distance(x, pictures(2)).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and x.grad.abs().sum() > 0


class Recorded(TorchDispatchMode):
    """Remembers the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def test_no_gradient_depends_on_the_order_of_a_gpus_threads() -> None:
    """PyTorch's own reflection and windows do, and deterministic=true refuses the former."""
    of, x = network(), pictures(1, side=32).requires_grad_()
    with Recorded() as recorded:
        of.distance(x, pictures(2, side=32)).sum().backward()
    assert "aten::convolution_backward" in recorded.names
    assert [name for name in recorded.names if "pool" in name or "pad" in name or "index" in name] == []


def test_making_it_draws_nothing_and_without_weights_it_says_nothing() -> None:
    before = torch.get_rng_state()
    of = Perceptual("vgg")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.isnan().all() for parameter in of.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Weights


def stored(folder: Path, tensors: dict[str, Any], name: str = "weights.pth") -> Path:
    path = folder / name
    torch.save(tensors, path)
    return path


def refusal(source: str | Path) -> str:
    with pytest.raises(LatentmillError) as refused:
        load_perceptual(str(source), key="eval.perceptual")
    assert isinstance(refused.value, WeightsError) and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_tells_its_kind_and_equal_weights_have_equal_hashes(tmp_path: Path, kind: Kind) -> None:
    tensors = dict(seeded(kind))
    path = stored(tmp_path, tensors)
    save_file(tensors, tmp_path / "same.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    one, two = load_perceptual(f"{path}#sha256={digest}"), load_perceptual(str(tmp_path / "same.safetensors"))
    assert one is not None and two is not None and one.name == f"st-{kind}" and one.sha256 == two.sha256
    assert one.sha256 != network("vgg" if kind == "alex" else "alex").sha256
    assert load_perceptual("none") is None
    refused = refusal(f"{path}#sha256={'0' * 64}")
    assert refused.startswith("eval.perceptual=") and "its SHA-256 begins with" in refused


def test_without_the_package_one_line_says_what_to_install_or_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "PACKAGE", "stlpips-pytorch-of-nobody")
    refused = refusal("st-alex")
    assert "is not installed" in refused and "pip install 'latentmill[perceptual]'" in refused
    assert "alex_shift_tolerant.pth" in refused and "eval.perceptual=FILE" in refused


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose code may not run, with seeded weights in place of its own."""
    (folder / "stlpips_pytorch_made-0.0.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: stlpips-pytorch-made\nVersion: 0.0.2\n"
    (folder / "stlpips_pytorch_made-0.0.2.dist-info/METADATA").write_text(metadata)
    weights = folder / "stlpips_pytorch/weights/vST0.0"
    weights.mkdir(parents=True)
    (folder / "stlpips_pytorch/__init__.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(loaded, "PACKAGE", "stlpips-pytorch-made")
    return stored(weights, dict(seeded("alex")), "alex_shift_tolerant.pth")


def test_the_packages_file_is_read_as_data_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = installed(tmp_path, monkeypatch)
    assert "its SHA-256 begins with" in refusal("st-alex")  # others than the published ones
    assert "there is no such file" in refusal("st-vgg")
    monkeypatch.setattr(loaded, "FILES", {"st-alex": ("alex", hashlib.sha256(path.read_bytes()).hexdigest())})
    of = load_perceptual("st-alex")
    assert of is not None and of.sha256 == network().sha256 and "stlpips_pytorch" not in sys.modules


BLUR = "net.slice2.4.filt"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"net.slice5.13.bias": None}, "net.slice5.13.bias is missing"),
        ({"lin4.model.1.weight": None}, "lin4.model.1.weight is missing"),
        ({"net.slice1.0.weight": None}, "holds no weights of st-LPIPS"),
        ({"net.slice1.0.weight": torch.zeros(64, 3, 7, 7)}, "holds no weights of st-LPIPS"),
        ({"net.slice6.15.weight": torch.zeros(1)}, "net.slice6.15.weight is no part of it"),
        ({"net.slice2.5.weight": torch.zeros(192, 64, 3, 3)}, "not (192, 64, 5, 5)"),
        ({"lin0.model.1.weight": torch.zeros(64)}, "not (1, 64, 1, 1)"),
        ({"net.slice2.5.bias": torch.full((192,), float("nan"))}, "net.slice2.5.bias holds NaN"),
        ({BLUR: torch.full((64, 1, 3, 3), 1 / 9)}, f"{BLUR} has other values"),
        ({"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, "scaling_layer.shift has other values"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_tensor_that_differs(
    tmp_path: Path, changes: dict[str, Tensor | None], says: str
) -> None:
    tensors = {name: tensor for name, tensor in (dict(seeded("alex")) | changes).items() if tensor is not None}
    assert says in refusal(stored(tmp_path, tensors))


def test_a_file_may_hold_the_blur_and_the_scaling_of_st_lpips(tmp_path: Path) -> None:
    """As the package's own files do."""
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    tensors = dict(seeded("alex")) | {BLUR: blur.repeat(64, 1, 1, 1), "scaling_layer.shift": shift}
    of = load_perceptual(str(stored(tmp_path, tensors)))
    assert of is not None and of.sha256 == network().sha256


@dataclass
class Harmful:
    path: str

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    path = stored(tmp_path, dict(seeded("alex")) | {"x": Harmful(str(tmp_path / "was_run"))})
    assert "cannot be read as tensors alone" in refusal(path)
    assert not (tmp_path / "was_run").exists()
