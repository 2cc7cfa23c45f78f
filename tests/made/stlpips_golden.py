"""Distances by the code of stlpips-pytorch 0.0.2 itself, stored in stlpips_golden.json: our network has to agree.

    pip download --no-deps stlpips-pytorch==0.0.2 && unzip -d WHEEL stlpips_pytorch-0.0.2-py3-none-any.whl
    PYTHONPATH=.:tests python tests/made/stlpips_golden.py WHEEL               # compares, both ways
    PYTHONPATH=.:tests python tests/made/stlpips_golden.py WHEEL --write       # writes the file anew
    PYTHONPATH=.:tests python tests/made/stlpips_golden.py WHEEL a.png b.png   # compares on pictures of one's own, too

"seeded" are distances with weights that are functions of seeds, so that the tests need no package; "published" are with
the package's own weights. The package imports IPython and torchsummary without saying so: both are stubs here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.perceptual.loaded import from_tensors, names
from pipeline.models.perceptual.network import STAGES, Kind, Perceptual
from pipeline.models.weights import read_file

FILE = Path(__file__).with_suffix(".json")
KINDS: tuple[Kind, ...] = ("alex", "vgg")
SIZES = ((64, 64), (32, 32), (61, 47))
"""(height, width) of the pictures."""


def uniform(seed: int, *shape: int) -> np.ndarray:
    """Numbers from -1 to 1, float32, the same with any version of NumPy."""
    count = int(np.prod(shape))
    words = np.random.Philox(key=seed).random_raw(-(-count // 2)).view(np.uint32)[:count]
    return (words.astype(np.float64) / 2**31 - 1).astype(np.float32).reshape(shape)


@cache
def seeded(kind: Kind) -> Mapping[str, Tensor]:
    """A file's tensors, with weights that keep the features of all depths about as large."""
    shapes = {name: parameter.shape for name, parameter in Perceptual(kind).named_parameters()}
    tensors = {}
    for seed, (name, ours) in enumerate(names(kind).items(), start=1):
        shape, numbers = tuple(shapes[ours]), uniform(seed, *shapes[ours])
        if len(shape) == 4:
            numbers *= (6 / np.prod(shape[1:])) ** 0.5
        elif name.startswith("lin"):
            numbers, shape = np.abs(numbers), (1, *shape, 1, 1)
        else:
            numbers *= 0.1
        tensors[name] = torch.from_numpy(numbers).reshape(shape)
    return tensors


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Pairs of batches of two pictures (2, 3, H, W) in [-1, 1] of each size: noise, and blocks against blocks that are
    one pixel away."""
    found = []
    for seed, (height, width) in enumerate(SIZES, start=1000):
        noise = uniform(seed, 2, 3, height, width)
        blocks = uniform(seed + 50, 3, -(-height // 8) + 1, -(-width // 8) + 1).repeat(8, 1).repeat(8, 2)
        x = np.stack([noise[0], blocks[:, :height, :width]])
        y = np.stack([noise[1], blocks[:, 1 : height + 1, 1 : width + 1]])
        found.append((torch.from_numpy(x), torch.from_numpy(y)))
    return found


def package(wheel: Path) -> Any:
    """The package's module, with stubs for what it imports and does not need."""
    declare_torchvision_ops()
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], attribute, None)
    sys.path.insert(0, str(wheel))
    from stlpips_pytorch import stlpips

    return stlpips


def own(module: Any, kind: Kind, weights: Mapping[str, Tensor] | None) -> torch.nn.Module:
    """The package's network with its published weights, or with others."""
    network = module.LPIPS(net=kind, variant="shift_tolerant", verbose=False)
    if weights is not None:
        network.load_state_dict(weights, strict=False)
    return network.eval()


def file_of(wheel: Path, kind: Kind) -> Path:
    """The package's weights."""
    return wheel / f"stlpips_pytorch/weights/vST0.0/{kind}_shift_tolerant.pth"


def photos(paths: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Each picture against itself moved by one pixel, and with fewer levels."""
    found = []
    for path in paths:
        with Image.open(path) as image:
            picture = np.asarray(image.convert("RGB"))[:257, :257]
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        found += [(x[..., 1:, 1:], x[..., :-1, :-1]), (x, (x * 8).round() / 8)]
    return found


def main(wheel: Path, words: list[str]) -> None:
    module = package(wheel)
    golden: dict[str, dict[str, list[list[float]]]] = {"seeded": {}, "published": {}}
    compared = pairs() + photos([word for word in words if word != "--write"])
    with torch.no_grad():
        for kind in KINDS:
            for which, weights in (("seeded", seeded(kind)), ("published", None)):
                theirs = own(module, kind, weights)
                ours = from_tensors(weights or read_file(file_of(wheel, kind))[0], which)
                theirs_found = [theirs(x.clone(), y.clone()).flatten().tolist() for x, y in compared]
                ours_found = [ours.distance(x, y).tolist() for x, y in compared]
                apart = max(abs(a - b) for p, q in zip(theirs_found, ours_found) for a, b in zip(p, q))
                print(f"{kind} {which}: {len(compared)} pairs, farthest apart {apart:.2g}, {theirs_found}")
                golden[which][kind] = theirs_found[: len(SIZES)]
    if "--write" in words:
        FILE.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert set(KINDS) < set(STAGES)  # LPIPS is another package's
    main(Path(sys.argv[1]), sys.argv[2:])
