"""The pictures that the records of a validation dataset hold, by image number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.validation import Validation
from pipeline.inference.pictures import to_uint8
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.latents import Latents

MOST_KEPT = 1 << 28
"""Bytes of decoded pictures that are kept between evaluations."""


class Records:
    """Images are numbered on from the first record again where there are more of them. The validation holds the arrays
    that its methods read."""

    def __init__(self, validation: Validation, first_stage: FirstStage) -> None:
        self.validation, self._first_stage = validation, first_stage
        self._latents = Latents.of(validation.contract)
        self._decoded: dict[int, np.ndarray] = {}

    def of(self, numbers: Sequence[int]) -> np.ndarray:
        """The record of each image, (B,)."""
        return np.array(numbers) % len(self.validation)

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """Scaled latents (B, C, h, w) float32 on the first stage's device; of a posterior its mode."""
        array = torch.from_numpy(self.validation.arrays[self._latents.member][self.of(numbers)])
        return self._latents.draw(array.to(self._first_stage.device), None)

    def pixels(self, numbers: Sequence[int]) -> np.ndarray:
        """The pictures as they are, (B, H, W, 3) uint8."""
        return np.ascontiguousarray(self.validation.arrays["pixels"][self.of(numbers)].transpose(0, 2, 3, 1))

    def decoded(self, numbers: Sequence[int]) -> np.ndarray:
        """The pictures after the autoencoder, (B, H, W, 3) uint8."""
        index = self.of(numbers).tolist()
        found = {i: self._decoded[i] for i in index if i in self._decoded}
        if missing := sorted(set(index) - set(found)):
            made = dict(zip(missing, to_uint8(self._first_stage.decode(self.latents(missing))), strict=True))
            found |= made
            if sum(picture.nbytes for picture in (*self._decoded.values(), *made.values())) <= MOST_KEPT:
                self._decoded |= made
        return np.stack([found[i] for i in index])
