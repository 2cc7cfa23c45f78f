"""A reference for rFID with features of a few numbers, in place of those of a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from made.autoencoder_run import SIDE, picture
from pipeline.data.format.contract import Contract
from pipeline.evaluation.features.networks import Features
from pipeline.evaluation.metrics.fid import Statistics
from pipeline.evaluation.reference import Reference, ReferenceFacts


def network(images: np.ndarray) -> Tensor:
    """Features of pictures: means of quarters of their red levels, and of their green ones."""
    blocks = torch.from_numpy(images[..., :2].copy()).float().permute(0, 3, 1, 2)
    return torch.nn.functional.adaptive_avg_pool2d(blocks, 2).flatten(1) / 255


def with_reference(contract: Contract, **changes: Any) -> dict[str, Any]:
    """Features, and a reference of 40 pictures of no cache, of which the last ten are held out. contract: of the cache
    whose pictures are compared with them."""
    features = Features("democlip", "f" * 64, 8, network, "none")
    others = network(np.stack([picture(9, row).transpose(1, 2, 0) for row in range(40)]))
    facts = {
        "features": "democlip", "features_sha256": "f" * 64, "resolution": SIDE, "crop": contract.crop,
        "resize": contract.resize, "dataset": "d" * 64, "vae_sha256": "b" * 64, "clip_sha256": "",
        "images": 30, "held": 10, **changes,
    }  # fmt: skip
    gaussian = Statistics.of(others[:30]).gaussian()
    reference = Reference(ReferenceFacts(**facts), gaussian, others[30:], others[30:].clone(), sha256="e" * 64)
    return {"features": features, "reference": reference}
