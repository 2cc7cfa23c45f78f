"""Guidance without retraining: the scores that sampling follows, in `sample` and `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipeline.config.values.bounds import Between, Ge

ASKED = {"classifier": "class", "image": "guide.target", "clip": "prompt"}
"""The guides, in the order in which their scores are taken, and the key of `sample` that says what each leads to. The
one that does not read the network comes first: what the others share is then freed with the last of them."""


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """Guidance of any model without training it again: sampling follows the gradient of a score (conf/guide/*.yaml
    chooses one, guide=[image,clip] several; docs/how_to/guide_without_retraining.md)."""

    image: float = 0.0
    """Weight of the likeness to a picture, -1/2 the sum of squared differences in the range of -1 to 1; 0 = no such
    guide."""
    clip: float = 0.0
    """Weight of the likeness to a caption, 100 x the cosine of CLIP's embeddings; 0 = no such guide."""
    classifier: float = 0.0
    """Weight of a class's logarithmic probability, of a classifier that was trained on noisy latents; 0 = no such
    guide. A weight below 0 leads away, here as above."""
    weight: float | None = None
    """Short for the weight of the one guide that is chosen. In eval 0 draws pictures without the guide, and measures
    them as guided ones are."""
    target: tuple[str, ...] = ()
    """sample guide=image: the picture to be like, of the images' size, or of it divided by one whole number; the
    images are then compared with it after they are made as small."""
    mask: str = ""
    """guide=image: a PNG of the target's size, white where the target counts; "" = everywhere."""
    grey: bool = False
    """guide=image: compare brightness alone, so that the target says nothing of colours."""
    factor: Annotated[int, Ge(1)] = 4
    """eval guide=image: the target of an image is its record's picture divided by this factor."""
    cutouts: Annotated[int, Between(0, 64)] = 0
    """guide=clip: squares of the picture that CLIP sees at each step besides the whole; 0 = the whole alone."""
    run: str = ""
    """guide=classifier: the run of the classifier (train task=classifier), on the same encoders and noise levels."""
    at: Annotated[int, Ge(0)] = 0
    """guide=classifier: sample count of its checkpoint; 0 = the newest."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each guide that is chosen, by its name, in the order in which scores are taken."""
        chosen = {name: weight for name in ASKED if (weight := getattr(self, name))}
        return chosen if self.weight is None else dict.fromkeys(chosen, self.weight)

    @property
    def asks(self) -> tuple[str, ...]:
        """Keys of `sample` that say what the chosen guides lead to."""
        return tuple(ASKED[name] for name in self.weights)
