"""What a cache's arrays take from its encoders: shapes, read from configuration files. Imports no torch, and loads and
fetches no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, NotFound, ParseError
from pipeline.parsing.values import parse_json
from pipeline.storage.urls import open_storage, split_url

DEMO = Path(__file__).resolve().parent.parent.parent / "assets" / "demo"
STAGE_FILE, TOWER_FILE = "config.json", "open_clip_config.json"
FILE_BYTES = 1 << 20
STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
"""The autoencoder of Stable Diffusion 1 and 2, for names on a hub and files without a configuration, as
models/encoders/autoencoder.py takes them."""
PIXELS = "pixels"
VQ = "VQModel"


@dataclass(frozen=True)
class StageFacts:
    """What a first stage makes of an image. channels: C of a latent. downsampling: pixels per latent position along a
    side. stored: the array of a record that holds the image (Contract.stored). scale, shift: of the latents. config: of
    the network, as diffusers writes it; {} of pixels."""

    channels: int
    downsampling: int
    stored: Literal["moments", "latents", "pixels"]
    scale: float
    shift: float
    config: Mapping[str, Any]


@dataclass(frozen=True)
class TowerFacts:
    """What a text tower makes of a caption. width: D of a state. vocabulary: number of token ids. config: of the tower,
    as open_clip writes it."""

    width: int
    vocabulary: int
    config: Mapping[str, Any]


def stage_facts(config: EncodersConfig) -> StageFacts:
    """The first stage that `config` names. Raises ConfigError for a configuration file that cannot be right."""
    if config.vae == PIXELS:
        return StageFacts(3, 1, "pixels", 1.0, 0.0, {})
    described, where = _stage_config(config)
    widths = described.get("block_out_channels", (64,))
    is_vq = described.get("_class_name") == VQ
    channels = (described.get("vq_embed_dim") if is_vq else None) or described.get("latent_channels", 3 if is_vq else 4)
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= 10 or not _is_whole(channels, 1024):
        raise ConfigError(f"{where}: block_out_channels={widths!r:.60}, latent_channels={channels!r:.20} cannot be")
    scale, shift = described.get("scaling_factor", 1.0 if is_vq else 0.18215), described.get("shift_factor") or 0.0
    return StageFacts(
        int(channels), 2 ** (len(widths) - 1), "latents" if is_vq else "moments", float(scale), float(shift), described
    )


def tower_facts(config: EncodersConfig) -> TowerFacts:
    """The text tower that `config` names. Raises ConfigError for a name that is neither the demo's, a folder nor one of
    open_clip's."""
    described, where = _tower_config(config)
    text = described.get("text_cfg")
    text = text if isinstance(text, dict) else {}
    width, vocabulary = text.get("width", 512), text.get("vocab_size", 49_408)
    if not _is_whole(width, 16_384) or not _is_whole(vocabulary, 4_000_000):
        raise ConfigError(f"{where}: text_cfg.width={width!r:.20}, text_cfg.vocab_size={vocabulary!r:.20} cannot be")
    return TowerFacts(width, vocabulary, described)


def _is_whole(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _stage_config(config: EncodersConfig) -> tuple[dict[str, Any], str]:
    """The autoencoder's configuration, and where it is from."""
    if config.weights:
        return _fetched(config, "vae", STAGE_FILE)
    if config.vae == "demo":
        return _read(str(DEMO / "vae" / STAGE_FILE))
    path = Path(config.vae).expanduser()
    folder = path / config.vae_subfolder
    for place in (folder, folder.parent):
        if (place / STAGE_FILE).is_file() and (place == folder or folder.is_file()):
            return _read(str(place / STAGE_FILE))
    return STABLE_DIFFUSION, f"encoders.vae={config.vae}"


def _tower_config(config: EncodersConfig) -> tuple[dict[str, Any], str]:
    """open_clip's model_cfg of the text tower, and where it is from."""
    folder = DEMO / "clip" if config.text == "demo" else Path(config.text).expanduser()
    if config.weights:
        described, where = _fetched(config, "text", TOWER_FILE)
    elif folder.is_dir():
        described, where = _read(str(folder / TOWER_FILE))
    else:
        spec = find_spec("open_clip")  # found, and not imported: that would import torch
        file = Path(spec.origin).parent / "model_configs" / f"{config.text}.json" if spec and spec.origin else None
        if file is None or "/" in config.text or not file.is_file():
            raise ConfigError(
                f"encoders.text={config.text} is neither demo, nor a folder, nor one of open_clip's models"
            )
        return _read(str(file))
    inner = described.get("model_cfg")
    if not isinstance(inner, dict):
        raise ConfigError(f"{where}: it has no model_cfg, so it is no tower's: take the folder anew")
    return inner, where


def _fetched(config: EncodersConfig, part: str, name: str) -> tuple[dict[str, Any], str]:
    """A file of encoders.weights, which `latentmill fetch` filled."""
    return _read(f"{config.weights.rstrip('/')}/{part}/{name}")


def _read(place: str) -> tuple[dict[str, Any], str]:
    """The object of a JSON file, and its place."""
    root, key = split_url(place)
    storage = open_storage(root)
    try:
        size = storage.stat(key).size
        value = parse_json(storage.get(key) if size <= FILE_BYTES else b"", FILE_BYTES)
    except NotFound:
        raise ConfigError(f"{place}: there is no such file, so nothing says what the encoders make") from None
    except ParseError as error:
        raise ConfigError(f"{place}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: it is no configuration of a network")
    return value, place
