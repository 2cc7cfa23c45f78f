"""Which digit a picture shows, by a support vector machine of scikit-learn; and what shards of digits hold."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

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


# --------------------------------------------------------------------------------------------------------------------
# Shards of examples/digits.py


def read(folder: Path) -> list[dict[str, bytes]]:
    """The records of a folder's shards: suffix -> bytes."""
    records: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                records.setdefault(key, {})[suffix] = file.read()
    return list(records.values())


def pixels(records: list[dict[str, bytes]]) -> np.ndarray:
    """Their pictures (N, H, W, 3) uint8."""
    return np.stack([np.asarray(Image.open(io.BytesIO(record["png"]))) for record in records])


def classes(records: list[dict[str, bytes]]) -> np.ndarray:
    """Their classes (N,)."""
    return np.array([int(record["cls"]) for record in records])
