"""All figures of one set of features, with their error bars where these are known."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from pipeline.evaluation.features.networks import Features
from pipeline.evaluation.metrics.error_bars import FrechetTo, fid_infinity, half_sample_error
from pipeline.evaluation.metrics.fid import RankDeficient, Statistics, fid, inception_score
from pipeline.evaluation.metrics.kernels import cmmd, kid
from pipeline.evaluation.metrics.manifold import NEIGHBOURS, precision_recall
from pipeline.evaluation.reference import Reference

FEWEST = 4  # images; half of them still have a covariance


def figures_of(
    features_NE: Tensor, statistics: Statistics, network: Features, reference: Reference, thorough: bool
) -> dict[str, Any]:
    """Figures of N generated images, from their features in the order of image numbers and the features' exact sums.

    FID is against the reference's Gaussian, with its error and its floors; KID, precision, recall and CMMD against the
    held-out real images. KID's _std is over its subsets. thorough: compute FID-infinity too, where N exceeds twice
    the features' width; with fewer images its line means nothing.
    """
    name, n = network.name, len(features_NE)
    figures: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficient)  # the card reports it
        figures[f"fid_{name}"] = fid(statistics.gaussian(), reference.gaussian)
    if n >= FEWEST:
        distance = FrechetTo(reference.gaussian)
        figures[f"fid_{name}_error"] = half_sample_error(n, lambda numbers: distance(features_NE[numbers]))
    floors = reference.floors(n)
    figures |= {f"fid_{name}_floor_{kind}": floors[kind] for kind in ("real", "reconstruction", "images")}
    if thorough and n > 2 * network.width:
        extrapolated = fid_infinity(features_NE, reference.gaussian)
        figures |= {f"fid_infinity_{name}": extrapolated.value, f"fid_infinity_{name}_error": extrapolated.error}
    real = reference.real
    if min(n, len(real)) > NEIGHBOURS:
        figures[f"kid_{name}"], figures[f"kid_{name}_std"] = kid(features_NE, real)
        figures[f"precision_{name}"], figures[f"recall_{name}"] = precision_recall(features_NE, real)
    if "clip" in name:
        figures[f"cmmd_{name}"] = cmmd(features_NE, real)
    if network.classes is not None:
        score, std = inception_score(features_NE, network.classes, splits=min(10, n))
        figures |= {"inception_score": score, "inception_score_std": std}
    return figures


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of the values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))
