"""Feature networks that FID and its like compare images by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.pictures import from_uint8
from pipeline.models.text import load_text


@dataclass(frozen=True)
class Features:
    """A feature network: images (N, H, W, 3) uint8 -> features (N, E) float32 on the CPU.

    name, sha256: which network, and the hash of its weights; figures made with different ones do not compare.
    """

    name: str
    sha256: str
    width: int
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: np.ndarray) -> Tensor:
        with torch.no_grad():
            return self.network(from_uint8(images)).float().cpu()


def democlip(device: torch.device | str, seed: int) -> Features:
    """Image embeddings, not normalised, of the CLIP that ships with latentmill and knows the captioned shapes alone."""
    tower = load_text(EncodersConfig(seed=seed), device)
    return Features("democlip", tower.image_sha256, tower.embed_dim, tower.encode_image)


FEATURES: dict[str, Callable[[torch.device | str, int], Features]] = {"democlip": democlip}


def load_features(name: str, device: torch.device | str = "cpu", seed: int = -1) -> Features:
    """The feature network of that name. seed >= 0: random weights (tests). Raises ConfigError for an unknown name."""
    if name not in FEATURES:
        raise ConfigError(f"features={name}: choose one of {', '.join(FEATURES)}")
    return FEATURES[name](device, seed)
