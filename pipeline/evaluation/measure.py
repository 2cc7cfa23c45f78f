"""What is measured of a batch of pictures and captions, and how batches are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.evaluation.metrics.fid import clip_similarity
from pipeline.evaluation.shapes.oracle import attribute_accuracy
from pipeline.models.encoders.text import TextTower

SHAPES_CANVAS = 64  # side in pixels of the pictures that the oracle judges


def clip_scores(tower: TextTower, pictures: np.ndarray, captions: Sequence[str]) -> Tensor:
    """100 x cosine between each picture (N, H, W, 3) uint8, by open_clip's own transform, and its caption: (N,) float64
    on the CPU."""
    text = tower.pooled(tower.tokenize(list(captions)))
    return clip_similarity(tower.encode_pictures(pictures), text).cpu()


def clip_identity(tower: TextTower) -> str:
    """Identity of the towers of a CLIP score: the beginnings of both hashes."""
    return f"{tower.weights_sha256[:32]}{tower.image_sha256[:32]}"


def shapes_accuracy(pictures: np.ndarray, captions: Sequence[str]) -> dict[str, Any]:
    """attribute_accuracy of pictures (N, H, W, 3) uint8.

    {} for pictures whose size is not that of the shapes world.
    """
    if pictures.shape[1:3] != (SHAPES_CANVAS, SHAPES_CANVAS):
        return {}
    return attribute_accuracy(pictures, captions)


def merge_accuracies(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The accuracy of all parts together, in attribute_accuracy's form.

    "overall" is missing unless every caption could be read, since a share of some images does not describe the set.
    """
    parts = [part for part in parts if part]
    merged: dict[str, Any] = {name: sum(part[name] for part in parts) for name in ("n", "unread")}
    for table in ("by_objects", "by_attribute"):
        keys = sorted({key for part in parts for key in part[table]})
        counts = {key: sum(part[f"n_{table}"].get(key, 0) for part in parts) for key in keys}
        right_counts = {
            key: sum(part[table][key] * part[f"n_{table}"][key] for part in parts if key in part[table]) for key in keys
        }
        merged[table] = {key: round(right_counts[key]) / counts[key] for key in keys}
        merged[f"n_{table}"] = counts
    if merged["n"] and not merged["unread"]:
        right_images = sum(round(part["overall"] * part["n"]) for part in parts if "overall" in part)
        merged["overall"] = right_images / merged["n"]
    return merged
