"""The networks beside the one that is trained: an autoencoder's halves, a text tower, and what judges pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import EncodersConfig, FeaturesName, FirstStageConfig
from pipeline.data.format.contract import Contract
from pipeline.planning.cached.encoders import stage_facts, tower_facts
from pipeline.planning.conditioning import transformer_parts
from pipeline.planning.first_stage import autoencoder_cost
from pipeline.planning.parts import Cost, Layer, Part, Piece

UNKNOWN = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)}
"""Widths of the levels of an autoencoder of which only the factor is known, over 128: as in Rombach et al. 2021."""
IN_DECODER = ("model.post_quant_conv", "model.decoder")
"""Beginnings of the names of the parts of an autoencoder's second half."""
FEATURES: dict[FeaturesName, tuple[float, float]] = {
    "democlip": (0.06, 0.6),
    "inception": (11.4, 23.8),
    "inception_pytorch": (11.4, 23.8),
    "inception_clean": (11.4, 23.8),
    "clip_b32": (8.8, 87.8),
    "clip_l14": (162.0, 304.0),
    "clip_l14_336": (382.0, 304.3),
    "dinov2_s14": (12.0, 22.1),
    "dinov2_l14": (162.0, 304.4),
}
"""GFLOPs of one picture and millions of parameters of each network of features, by its publication; democlip by its
size."""


@dataclass(frozen=True)
class Encoders:
    """An autoencoder and a text tower, by their configuration files."""

    stage: FirstStageConfig | None
    """None for pixels."""
    tower_config: Mapping[str, Any]
    """Of open_clip; {} where captions are not read."""
    tokens: int
    """Tokens of a caption."""

    @classmethod
    def of(cls, config: EncodersConfig, contract: Contract) -> Encoders:
        """Those of a cache. contract: of it, which says what an unknown autoencoder makes. Raises ConfigError."""
        facts = stage_facts(config)
        if contract.stored == "pixels":
            stage = None
        elif (facts.channels, facts.downsampling) == (contract.latent_shape[0], contract.downsampling):
            stage = first_stage_of(facts.config)
        else:
            stage = FirstStageConfig(
                channels=128,
                multipliers=UNKNOWN.get(contract.downsampling, UNKNOWN[8]),
                blocks=2,
                latent_channels=contract.latent_shape[0],
            )
        tower = tower_facts(config).config if contract.text is not None else {}
        return cls(stage, tower, contract.text.length if contract.text is not None else 0)

    def encoder(self, contract: Contract, images: int) -> Cost | None:
        """Encoding so many pictures of a cache's size; None of pixels. Of what is stored beside them, masked pictures
        are encoded as well."""
        half = self._half(contract, images, decoder=False)
        mask = contract.conditions.mask
        if half is None or mask is None:
            return half
        return Cost(half.parts * (1 + mask.variants), half.inputs)

    def decoder(self, contract: Contract, images: int) -> Cost | None:
        """Decoding as many; None of pixels."""
        return self._half(contract, images, decoder=True)

    def _half(self, contract: Contract, images: int, *, decoder: bool) -> Cost | None:
        if self.stage is None:
            return None
        _, height, width = contract.latent_shape
        factor = contract.downsampling
        whole = autoencoder_cost(self.stage, images, height * factor, width * factor)
        parts = tuple(part for part in whole.parts if part.name.startswith(IN_DECODER) == decoder)
        return Cost(parts, whole.inputs)

    def tower(self, captions: int) -> Cost | None:
        """Encoding so many captions; None where none are read."""
        text = self.tower_config.get("text_cfg")
        if not isinstance(text, Mapping) or not captions:
            return None
        width, heads = int(text.get("width", 512)), int(text.get("heads", 8))
        layers, words = int(text.get("layers", 12)), int(text.get("vocab_size", 49408))
        head = max(width // max(heads, 1), 1)
        blocks = transformer_parts(
            "text", width, depth=layers, heads=heads, head_width=head, batch=captions, tokens=self.tokens
        )
        table = Layer(name="embed", kind="linear", flops=0, parameters=(words + self.tokens) * width)
        return Cost((Part("text.embed", (Piece(row="none", layers=(table,)),)), *blocks))


def first_stage_of(config: Mapping[str, Any]) -> FirstStageConfig:
    """An autoencoder's architecture from the configuration that diffusers writes (config.json)."""
    widths = tuple(int(width) for width in config.get("block_out_channels", (64,)))
    downs = tuple(str(kind) for kind in config.get("down_block_types", ()))
    is_vq = config.get("_class_name") == "VQModel"
    return FirstStageConfig(
        regularizer="vq" if is_vq else "kl",
        channels=widths[0],
        multipliers=tuple(max(1, round(width / widths[0])) for width in widths),
        blocks=int(config.get("layers_per_block", 1)),
        latent_channels=int(config.get("vq_embed_dim") or config.get("latent_channels", 4)),
        attention=tuple(2**level for level, kind in enumerate(downs) if "Attn" in kind),
        middle_attention=bool(config.get("mid_block_add_attention", True)),
        codes=int(config.get("num_vq_embeddings", 256)) if is_vq else FirstStageConfig.codes,
    )


def features_cost(name: FeaturesName, images: int) -> Cost:
    """A network of features on so many pictures."""
    gflop, millions = FEATURES[name]
    layer = Layer(name=name, kind="conv", flops=round(gflop * 1e9 * images), parameters=round(millions * 1e6))
    return Cost((Part(f"features.{name}", (Piece(row="none", layers=(layer,)),)),))
