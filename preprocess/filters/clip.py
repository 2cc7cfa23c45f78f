"""The filter on the similarity of picture and caption, by the CLIP whose text tower encodes the captions anyway.

A score is 100 x cosine of both embeddings, of the whole upright picture as CLIP sees it (its shorter side resized, and
the middle cut out), whatever crop is encoded. Scores of pictures that are computed together differ in their last bits
from those of other batches; one that is within CLOSE of the limit is therefore computed again by itself, and so the
decision on a sample depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.metrics.fid import clip_similarity
from pipeline.inference.pictures import from_uint8
from pipeline.models.encoders.text import TextTower
from preprocess.source.recipe import Recipe
from preprocess.source.rejected import Rejected, bounded
from preprocess.source.sample import FILTERED, Prepared

REASON = f"{FILTERED}clip_score"
CLOSE = 0.1
"""Of a score from the limit: a hundred times what the arithmetic of a GPU's tensor cores changes."""
TRANSFORM = {"resize_mode": "shortest", "interpolation": "bicubic"}
"""What the copy of a picture is made by (preprocess/source/sample.py), of open_clip's settings."""


class ClipFilter:
    """Rejects samples whose score is below `least`. together: results that are
    looked at together."""

    def __init__(self, tower: TextTower, least: float, together: int) -> None:
        self.tower, self.least, self.together = tower, least, together

    def judged(self, group: Sequence[Prepared | Rejected]) -> Iterator[Prepared | Rejected]:
        """Yields the results in order, with a rejection in place of a sample that is not similar enough."""
        scores = iter(self.scores([result for result in group if isinstance(result, Prepared)]))
        for result in group:
            if isinstance(result, Prepared):
                score = next(scores)
                if abs(score - self.least) < CLOSE:
                    score = self.scores([result])[0]
                result.whole = None  # it is not needed any more
                if not score >= self.least:
                    found = f"{score:.2f}, filters.clip_score={self.least:g}"
                    result = Rejected(bounded(result.key), REASON, found)
            yield result

    @torch.no_grad()
    def scores(self, samples: Sequence[Prepared]) -> list[float]:
        """100 x cosine of each sample's picture and caption."""
        if not samples:
            return []
        pictures = [sample.whole for sample in samples if sample.whole is not None]
        images = self.tower.encode_sized(from_uint8(np.stack(pictures)))
        texts = self.tower.pooled(torch.tensor([sample.ids for sample in samples]))
        return [float(score) for score in clip_similarity(images, texts).cpu()]


def clip_filter_of(config: EncodeConfig, recipe: Recipe, tower: TextTower | None) -> ClipFilter | None:
    """The filter that a configuration asks for, if it does. Raises ConfigError for a CLIP that sees pictures in
    another way than the copies are made."""
    least = config.filters.clip_score
    if not least:
        return None
    assert tower is not None, "check_captions lets it pass with captions alone"
    require_transform(tower, recipe.whole)
    return ClipFilter(tower, least, config.batch)


def require_transform(tower: TextTower, size: tuple[int, int]) -> None:
    """Raises ConfigError unless the tower's pictures are made as `whole_picture` makes them. size: (width, height)."""
    stated = tower.model.visual.preprocess_cfg
    for name, wanted in TRANSFORM.items():
        if stated.get(name, wanted) != wanted:
            raise ConfigError(
                f"filters.clip_score: the CLIP of encoders.text has {name}={stated[name]}, and only {wanted} is "
                "supported: leave the filter out, or encode with another text tower"
            )
    if tower.image_size != size[::-1]:
        raise ConfigError(
            f"filters.clip_score: the CLIP of encoders.text sees {tower.image_size} pixels, its architecture says "
            f"{size[::-1]}: leave the filter out, or encode with another text tower"
        )
