"""The task of layout-to-image: boxes with classes (Rombach et al. 2021, section 4.3.2, with another encoder)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import LayoutTask, ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError
from pipeline.models.tasks.captions import Captioned, beside
from pipeline.models.tasks.task import Visit
from pipeline.models.tasks.transformer import Transformer

BANDS = 4
"""Octaves of the sinusoids of an edge."""
SIDES = "latent.sides"
"""Member of a batch, (B, 2) int64 on the CPU: h and w of its latents, all equal."""


class Layout(Captioned):
    """A set of boxes as a context: a token that is always there, and one for each box; their order does not matter."""

    ADAM_ONLY = ("first", "last", "paint")

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, LayoutTask), config
        facts, width = cache.conditions.boxes, model.context_width
        if facts is None:
            raise ConfigError("task=layout needs a cache with boxes: encode it with conditions=[boxes]")
        self.embed = nn.Embedding(facts.count + 1, width)  # the last row is the token that is always there
        self.first = nn.Linear(4 + 8 * BANDS, width)
        self.hidden = nn.Linear(width, width)
        self.last = nn.Linear(width, width)
        transformer = config.encoder == "transformer"
        self.transformer = Transformer(width, config.depth, config.heads, config.head_width) if transformer else None
        self.paint = nn.Embedding(facts.count, config.paint) if config.paint else None
        self.coordinates = config.coordinates
        self.sides = cache.latent_shape[1:]

    def drawn(self, batch: Mapping[str, Tensor], visit: Visit) -> dict[str, Tensor]:
        return {SIDES: torch.tensor([visit.sides or self.sides]).expand(len(visit.numbers_B), 2)}

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        boxes = batch["cond.boxes"]
        classes, edges = boxes[..., 0], boxes[..., 1:].float()
        there = classes >= 0
        tokens = self.embed(classes.clamp(min=0).long()) + self.first(edge_features(edges).to(self.first.weight.dtype))
        tokens = self.last(F.silu(self.hidden(F.silu(tokens))))
        always = self.embed.num_embeddings - 1
        begin = self.embed(torch.full((len(boxes), 1), always, device=boxes.device))
        context = torch.cat([begin, tokens], dim=1)
        mask: Tensor | None = torch.cat([torch.ones_like(there[:, :1]), there], dim=1)
        if self.transformer is not None:
            context = self.transformer(context, mask)
        if self.captions is not None:
            context, mask = beside(context, mask, *self.captions(batch))
        return Conditioning(context=context, context_mask=mask, concat=self._concat(classes, edges, there, batch))

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.captions is not None:
            return super().null(batch)
        return {**batch, "cond.boxes": torch.full_like(batch["cond.boxes"], -1)}

    def _concat(self, classes: Tensor, edges: Tensor, there: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Planes (B, C, h, w) that are concatenated, or None."""
        height, width = batch[SIDES][0].tolist() if SIDES in batch else self.sides
        planes = []
        if self.coordinates:
            y, x = (centres(side, classes.device) for side in (height, width))
            plane = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
            planes.append(plane.expand(len(classes), -1, -1, -1))
        if self.paint is not None:
            vectors = self.paint(classes.clamp(min=0).long()) * there[..., None]
            columns, rows = covered(edges[..., 0::2], width), covered(edges[..., 1::2], height)
            planes.append(torch.einsum("bnc,bnh,bnw->bchw", vectors, rows.to(vectors), columns.to(vectors)))
        return torch.cat([plane.to(planes[-1]) for plane in planes], dim=1) if planes else None


def edge_features(edges: Tensor) -> Tensor:
    """Edges (..., 4) in [0, 1] -> (..., 4 + 8 BANDS): themselves, and sinusoids of pi, 2 pi, ... times them."""
    angles = edges[..., None] * (math.pi * 2.0 ** torch.arange(BANDS, device=edges.device))
    return torch.cat([edges, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


def centres(side: int, device: torch.device) -> Tensor:
    """The middles of `side` positions, from -1 to 1."""
    return (2 * torch.arange(side, dtype=torch.float32, device=device) + 1) / side - 1


def covered(span: Tensor, side: int) -> Tensor:
    """How much of each of `side` positions a span (..., 2) of two edges in [0, 1] covers: (..., side) in [0, 1]."""
    place = torch.arange(side, dtype=torch.float32, device=span.device)
    low, high = (span[..., i, None] * side for i in range(2))
    return (torch.minimum(high, place + 1) - torch.maximum(low, place)).clamp(0, 1)
