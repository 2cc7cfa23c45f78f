"""What the configuration files of encoders may say: types and bounds, before a network is built of them.

Only what bounds the size of a network, names code or weights, or is computed with is declared; other keys go to
diffusers and open_clip as they are. Nothing here needs PyTorch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pipeline.config.values.bounds import Between, Gt
from pipeline.errors import ParseError, WeightsError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json

T = TypeVar("T")
CONFIG_BYTES = 1 << 20
MOST_LAYERS, WIDEST = 200, 16_384
Width = Annotated[int, Between(1, WIDEST)]
Layers = Annotated[int, Between(1, MOST_LAYERS)]
Side = Annotated[int, Between(1, 4096)]
Ratio = Annotated[float, Between(0, 64, "()")]


class OwnNetwork:
    """A bound on text: a network in the list of a package, not one of a hub or of a folder."""

    words = "the name of a network is wanted, which nothing is fetched for"

    @staticmethod
    def admits(name: str) -> bool:
        return re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name) is not None


@dataclass(frozen=True)
class Autoencoder:
    """config.json of an AutoencoderKL."""

    scaling_factor: Annotated[float, Between(1e-6, 1e6)] = 0.18215
    shift_factor: Annotated[float, Between(-1e6, 1e6)] | None = None
    block_out_channels: tuple[Width, ...] = (64,)
    layers_per_block: Annotated[int, Between(1, 32)] = 1
    latent_channels: Annotated[int, Between(1, 1024)] = 4
    norm_num_groups: Width = 32
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)


@dataclass(frozen=True)
class Quantised(Autoencoder):
    """config.json of a VQModel. vq_embed_dim: channels of the codebook's entries; None = latent_channels."""

    latent_channels: Annotated[int, Between(1, 1024)] = 3
    num_vq_embeddings: Annotated[int, Between(1, 1 << 22)] = 256
    vq_embed_dim: Annotated[int, Between(1, 1024)] | None = None
    norm_type: Literal["group", "spatial"] = "group"


MOST_BLOCKS = 10
"""Levels of an autoencoder, at most."""


@dataclass(frozen=True)
class Text:
    """text_cfg of open_clip. context_length: a mask of its square is built."""

    context_length: Annotated[int, Between(1, 4096)] = 77
    vocab_size: Annotated[int, Between(1, 4_000_000)] = 49_408
    width: Width = 512
    heads: Annotated[int, Between(1, 1024)] = 8
    layers: Layers = 12
    mlp_ratio: Ratio = 4.0
    hf_model_name: str | None = None
    hf_tokenizer_name: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Vision:
    """vision_cfg of open_clip."""

    image_size: Side | tuple[Side, Side] = 224
    patch_size: Annotated[int, Between(1, 1024)] | None = 16
    layers: Layers | tuple[Layers, Layers, Layers, Layers] = 12
    width: Width = 768
    head_width: Width = 64
    mlp_ratio: Ratio = 4.0
    attn_pooler_queries: Annotated[int, Between(1, 4096)] = 256
    attn_pooler_heads: Annotated[int, Between(1, 1024)] = 8
    timm_model_name: Annotated[str, OwnNetwork()] | None = None


@dataclass(frozen=True)
class Tower:
    """model_cfg of open_clip."""

    embed_dim: Width
    vision_cfg: Vision
    text_cfg: Text
    quick_gelu: bool = False
    custom_text: bool = False


Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """preprocess_cfg of open_clip: how pictures are normalized."""

    mean: Colour | None = None
    std: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)], Annotated[float, Gt(0)]] | None = None


@dataclass(frozen=True)
class TowerFile:
    """open_clip_config.json."""

    model_cfg: Tower
    preprocess_cfg: Preprocess | None = None


def read_described(path: Path, cls: type[T]) -> tuple[dict[str, Any], T]:
    """(the whole content, what is declared of it) of a configuration file. Raises WeightsError."""
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path} is no file")
    try:
        with path.open("rb") as file:
            content = parse_json(file.read(CONFIG_BYTES + 1), CONFIG_BYTES)
        return content, build(cls, content, unknown="pass")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    except ParseError as error:
        raise WeightsError(f"{path}: {error}") from None


def described_tower(model_cfg: Any, where: str) -> Tower:
    """What is declared of a `model_cfg`. Raises WeightsError, also for a text tower that would be fetched."""
    try:
        tower = build(Tower, model_cfg, unknown="pass")
    except ParseError as error:
        raise WeightsError(f"{where}: {error}") from None
    if tower.text_cfg.hf_model_name:
        raise WeightsError(
            f"{where} uses another tokenizer than CLIP's, and a text tower of transformers (hf_model_name), which are "
            "not supported"
        )
    return tower
