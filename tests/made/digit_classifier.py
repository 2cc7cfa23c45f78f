"""Which digit a picture shows: a support vector machine of scikit-learn, trained on real digits of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from examples.digits import INK

SIDE = 8


class DigitClassifier:
    """Pictures (N, H, W, 3) uint8 -> classes (N,) from 0 to 9."""

    def __init__(self, pictures: np.ndarray, classes: np.ndarray) -> None:
        """Trained on pictures with known classes."""
        from sklearn.svm import SVC

        self._machine = SVC(gamma=0.001).fit(features(pictures), classes)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return np.asarray(self._machine.predict(features(pictures)))

    def share(self, pictures: np.ndarray, classes: np.ndarray) -> float:
        """Share of the pictures that show their class."""
        return float(np.mean(self(pictures) == classes))


def features(pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8, H and W multiples of 8 -> (N, 64): ink, from 0 to INK, at the digits' own pixels."""
    grey = (Image.fromarray(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for picture in pictures)
    return np.stack([np.asarray(small, dtype=np.float64).reshape(-1) for small in grey]) * (INK / 255)
