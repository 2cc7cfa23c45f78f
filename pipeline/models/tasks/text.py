"""The task of text-to-image: captions condition the UNet by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, TaskConfig, TextTask
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError
from pipeline.models.tasks.captions import Captions
from pipeline.models.tasks.task import Task
from pipeline.models.tasks.transformer import Transformer


class Text(Task):
    """Captions as a context: states that the cache holds, or those of a transformer that is trained with the UNet."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, TextTask), config
        cached = config.encoder == "cached"
        self.captions = Captions(cache, empty_LD, "task=text") if cached else None
        self.tokens = None if cached else Tokens(config, model.context_width, cache)

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        if self.captions is not None:
            context, mask = self.captions(batch)
            return Conditioning(context=context, context_mask=mask)
        assert self.tokens is not None
        return Conditioning(context=self.tokens(batch["tokens"]))

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.captions is not None:
            return self.captions.null(batch)
        assert self.tokens is not None
        return {**batch, "tokens": self.tokens.empty.to(batch["tokens"]).expand_as(batch["tokens"])}


class Tokens(nn.Module):
    """Token ids (B, L) -> context (B, L, D), by a transformer without masks (Rombach et al. 2021, section 4.3.1 and
    table 17: 32 blocks of width 1280, 8 heads of 64)."""

    empty: Tensor

    def __init__(self, config: TextTask, width: int, cache: Cache) -> None:
        super().__init__()
        text = cache.text
        if text is None or not text.vocabulary:
            raise ConfigError(
                "task.encoder=transformer needs a cache with text_storage=tokens, of this version's encode"
            )
        self.embed = nn.Embedding(text.vocabulary, width)
        self.place = nn.Embedding(text.length, width)
        self.transformer = Transformer(width, config.depth, config.heads, config.head_width)
        empty = torch.full((text.length,), text.pad)
        empty[0], empty[1] = text.start, text.eot
        self.register_buffer("empty", empty, persistent=False)  # the empty caption: start, end, padding

    def forward(self, tokens_BL: Tensor) -> Tensor:
        places = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        return self.transformer(self.embed(tokens_BL.long()) + self.place(places))
