"""The probability of a class, by a classifier of noisy latents (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level


class Classifier(Protocol):
    """A trained classifier (inference/classifier.py, TrainedClassifier)."""

    def log_probability(self, x_BCHW: Tensor, timestep: float, sigma: float, classes_B: Tensor) -> Tensor:
        """log p(class | x) of each image, (B,) float32, differentiable in x."""


class ClassifierScore:
    """log p(c | x) of each image's class c. It reads x, and not what the network makes of it, so its gradient costs
    the classifier alone."""

    def __init__(self, classifier: Classifier, classes: Sequence[int], device: torch.device) -> None:
        """classes: one for each image."""
        self._classifier = classifier
        self._classes_B = torch.tensor(classes, dtype=torch.int64, device=device)

    def __call__(self, x0_BCHW: Tensor, x_BCHW: Tensor, level: Level) -> Tensor:
        """(B,) float32."""
        return self._classifier.log_probability(x_BCHW, level.timestep, level.sigma, self._classes_B)
