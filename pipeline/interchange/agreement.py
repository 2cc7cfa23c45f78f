"""The check of `latentmill export`: what was written must compute what the checkpoint computes."""

from __future__ import annotations

from torch import Tensor

from pipeline.errors import LatentmillError
from pipeline.log import show

TOLERANCE = 1e-4  # relative, of the denoiser's output and of the text states


class ExportDiffers(LatentmillError):
    """The exported files do not compute what the checkpoint computes."""


def compare(what: str, theirs: Tensor, ours: Tensor) -> float:
    """`judge` the largest difference between two tensors, relative to the largest value of ours."""
    return judge(what, float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-30)))


def judge(what: str, difference: float) -> float:
    """Print the largest relative difference and return it. Raises ExportDiffers when it exceeds TOLERANCE or is NaN."""
    show(f"check: {what} differ by {difference:.2g} at most (relative; {TOLERANCE:g} is allowed)")
    if not difference <= TOLERANCE:
        raise ExportDiffers(f"{what} differ by {difference:.2g} (relative); nothing was written to the destination")
    return difference
