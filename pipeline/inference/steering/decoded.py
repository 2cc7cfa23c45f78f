"""Pictures of predicted latents, with gradients, for guides that look at pixels."""

from __future__ import annotations

from torch import Tensor

from pipeline.models.encoders.first_stage import FirstStage


class Decoded:
    """Decodes a prediction once for all guides that look at it.

    The graph of a prediction is freed with the gradient of the last score that reads it, so guides that share it stand
    one after the other.
    """

    def __init__(self, first_stage: FirstStage) -> None:
        self._stage = first_stage
        self._of: Tensor | None = None
        self._pictures: Tensor | None = None

    def __call__(self, x0_BCHW: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) float32, -1 to 1 and beyond: what is clamped would have
        no gradient."""
        if self._of is not x0_BCHW or self._pictures is None:
            # Gradients of 16-bit decoders underflow.
            self._of, self._pictures = x0_BCHW, self._stage.float32().decode_with_gradient(x0_BCHW)
        return self._pictures
