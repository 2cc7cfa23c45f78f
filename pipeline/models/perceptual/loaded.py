"""The weights of a perceptual distance, read as data: of the package stlpips-pytorch, whose code is never imported, or
of a file.

eval.perceptual=st-alex                          # or st-vgg: of the package, pip install 'latentmill[perceptual]'
eval.perceptual=alex_shift_tolerant.pth          # a file of that package, or a URL, with #sha256=... if wished
eval.perceptual=lpips-vgg:lpips_vgg.pth          # LPIPS with VGG-16, also by a URL or a hash
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import WeightsError
from pipeline.models.given_weights import weights_file
from pipeline.models.perceptual.network import BLUR, MEAN, SPREAD, STAGES, Kind, Perceptual
from pipeline.models.weights import read_file, require_finite
from pipeline.parsing.text import one_line

PACKAGE, VERSION = "stlpips-pytorch", "0.0.2"
FILES: dict[str, tuple[Kind, str]] = {
    "st-alex": ("alex", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"),
    "st-vgg": ("vgg", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"),
}
"""Kind and SHA-256 of the package's file for each name."""
BACKBONES: tuple[Kind, ...] = ("alex", "vgg")
"""Those of st-LPIPS."""
LPIPS = "lpips-vgg:"
"""What precedes a file or URL with weights of LPIPS."""


def load_perceptual(source: str, device: torch.device | str = "cpu", key: str = "perceptual") -> Perceptual | None:
    """The distance with the weights that `source` names: st-alex, st-vgg, a file or URL with weights of either kind, or
    lpips-vgg: and a file or URL with LPIPS'; None for "none".

    key: of the configuration, for messages. Raises WeightsError where they are missing, damaged or others.
    """
    if source == "none":
        return None
    if source.startswith(LPIPS):
        path = weights_file(source.removeprefix(LPIPS), key, LPIPS)
        return lpips_from_tensors(read_file(path)[0], f"{key}={source}").to(device)
    if source in FILES:
        kind, digest = FILES[source]
        path = weights_file(f"{_packaged(source, kind, key)}#sha256={digest}", key)
    else:
        path = weights_file(source, key)
    network = from_tensors(read_file(path)[0], f"{key}={source}")
    if source in FILES:
        assert network.name == source, "FILES has another file's hash"
    return network.to(device)


def from_tensors(tensors: Mapping[str, Tensor], where: str) -> Perceptual:
    """st-LPIPS with the tensors of a file, whose names tell its kind. where: what messages begin with.

    Raises WeightsError unless they are all of a network of one kind, and its blur and scaling are those of st-LPIPS."""
    if "net.slice2.5.weight" in tensors and "net.slice2.7.weight" in tensors:
        raise WeightsError(f"{where} holds LPIPS with VGG-16, and not st-LPIPS: give it as {LPIPS}FILE")
    first = tensors.get("net.slice1.0.weight")
    shape = () if first is None else tuple(first.shape)
    kinds = [kind for kind in BACKBONES if shape == (64, 3, STAGES[kind][0].kernel, STAGES[kind][0].kernel)]
    if not kinds:
        raise WeightsError(
            f"{where} holds no weights of st-LPIPS, whose net.slice1.0.weight is (64, 3, 11, 11) with AlexNet and "
            f"(64, 3, 3, 3) with VGG: give a file of the package stlpips-pytorch, or LPIPS as {LPIPS}FILE"
        )
    return _filled(kinds[0], tensors, where, f"st-LPIPS with {kinds[0]}")


def lpips_from_tensors(tensors: Mapping[str, Tensor], where: str) -> Perceptual:
    """LPIPS with the tensors of a file: those of LPIPS(net="vgg") of the package lpips or of taming-transformers, or
    VGG-16 as torchvision names it (features.0.weight, ...) beside the heads that both of these ship as vgg.pth.

    where: what messages begin with. Raises WeightsError unless they are all there, and nothing else than the classifier
    of torchvision's."""
    backbone = [name for name in tensors if name.startswith(("net.", "features."))]
    heads = [name for name in tensors if name.startswith("lin")]
    if bool(backbone) != bool(heads):
        missing, there = ("VGG-16", "LPIPS' heads") if heads else ("LPIPS' heads", "VGG-16")
        raise WeightsError(
            f"{where} holds {there} alone: put {missing} into the same file, as docs/how_to/evaluate.md says"
        )
    if "net.slice2.6.weight" in tensors and "net.slice2.5.weight" not in tensors:
        raise WeightsError(f"{where} holds st-LPIPS, and not LPIPS: give it without {LPIPS}")
    ours = {f"features.{name.split('.', 2)[2]}": name for name in names("lpips-vgg") if name.startswith("net.")}
    ours |= {f"lins.{name.removeprefix('lin')}": name for name in names("lpips-vgg") if name.startswith("lin")}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("classifier."):
            continue
        same = found.setdefault(ours.get(name, name), tensor)
        if same is not tensor and not (same.shape == tensor.shape and torch.equal(same, tensor)):
            raise WeightsError(f"{where} holds {one_line(ours.get(name, name))[:100]} twice, with other values")
    return _filled("lpips-vgg", found, where, "LPIPS with VGG-16")


def _filled(kind: Kind, tensors: Mapping[str, Tensor], where: str, what: str) -> Perceptual:
    """The distance with the tensors of a file, under its names. what: it is, for messages. Raises WeightsError."""
    other = f"{where} holds another network than {what}"
    network, parameters, constants = Perceptual(kind), names(kind), _constants(kind)
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise WeightsError(f"{other}: {missing[0]} is missing")
    if unknown := sorted(tensors.keys() - parameters.keys() - constants.keys()):
        raise WeightsError(f"{other}: {one_line(unknown[0])[:100]} is no part of it")
    for name, tensor in tensors.items():
        ours = network.get_parameter(parameters[name]) if name in parameters else constants[name]
        wanted = (1, *ours.shape, 1, 1) if ours.dim() == 1 and name.startswith("lin") else tuple(ours.shape)
        if tuple(tensor.shape) != wanted:
            raise WeightsError(f"{other}: {name} is {tuple(tensor.shape)}, not {wanted}")
        try:
            require_finite(name, tensor)
        except WeightsError as error:
            raise WeightsError(f"{where}: {error}") from None
        if name in parameters:
            ours.copy_(tensor.reshape(ours.shape))
        elif not torch.allclose(tensor.float(), ours, atol=1e-6):
            raise WeightsError(f"{other}: {name} has other values")
    return network


def names(kind: Kind) -> dict[str, str]:
    """Our name of each parameter by its name in a file."""
    found = {}
    convolutions = itertools.count()
    for number, layers in enumerate(_layers(kind)):
        for layer in layers.convolutions:
            place = next(convolutions)
            for part in ("weight", "bias"):
                found[f"net.slice{number + 1}.{layer}.{part}"] = f"convolutions.{place}.{part}"
        found[f"lin{number}.model.1.weight"] = f"heads.{number}"
    return found


@dataclass
class _Layers:
    """Numbers of a stage's layers in a file, which counts those of all stages, windows and ReLUs among them. blurs:
    with the number of channels that each blurs."""

    convolutions: list[int]
    blurs: dict[int, int]


def _layers(kind: Kind) -> Iterator[_Layers]:
    layer, width = 0, 3
    for stage in STAGES[kind]:
        found = _Layers([], {})
        if stage.window and stage.step == 1:
            found.blurs[layer + 1] = width
            layer += 2
        elif stage.window:
            layer += 1
        for width in stage.widths:
            found.convolutions.append(layer)
            if stage.blurs:
                layer += 1
                found.blurs[layer] = width
            layer += 2
        yield found


def _constants(kind: Kind) -> dict[str, Tensor]:
    """What a file may hold beside parameters, by its name there."""
    found = {
        "scaling_layer.shift": torch.tensor(MEAN).reshape(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor(SPREAD).reshape(1, 3, 1, 1),
    }
    blur = torch.outer(torch.tensor(BLUR), torch.tensor(BLUR))
    for number, layers in enumerate(_layers(kind), start=1):
        for layer, channels in layers.blurs.items():
            found[f"net.slice{number}.{layer}.filt"] = blur.expand(channels, 1, 3, 3)
    return found


def _packaged(source: str, kind: Kind, key: str) -> Path:
    """The package's file, found without importing the package."""
    try:
        files = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise WeightsError(
            f"{key}={source} reads weights of the package {PACKAGE} {VERSION}, which is not installed: pip install "
            f"'latentmill[perceptual]', or give its file {kind}_shift_tolerant.pth or a URL of it, {key}=FILE"
        ) from None
    return Path(str(files.locate_file(f"stlpips_pytorch/weights/vST0.0/{kind}_shift_tolerant.pth")))
