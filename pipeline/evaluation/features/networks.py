"""Feature networks, by which FID and similar figures compare pictures: one table, one interface.

A figure depends on the network, its weights and the resizing of pictures. Name, resize and hash are stored with every
figure and reference, and figures of different ones are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.evaluation.features.inception import SIDE, WIDTH, Inception
from pipeline.evaluation.features.resize import RESIZES
from pipeline.inference.pictures import from_uint8
from pipeline.inference.precision import products
from pipeline.models.encoders.fetched import hub_error, quiet_hub_clients
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.given_weights import weights_file
from pipeline.models.weights import read_file, weights_hash

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class Features:
    """A feature network: pictures (N, H, W, 3) uint8 -> features (N, E) float32 on the CPU.

    name, resize, sha256: which network, how pictures are resized for it, and the hash of its weights. width: E.
    classes: (K, E) float32, for networks that classify. Class scores are features times its transpose, without a bias,
    as in the Inception Score.
    """

    name: str
    sha256: str
    width: int
    network: Callable[[np.ndarray], Tensor]
    resize: str = ""
    classes: Tensor | None = None

    def __call__(self, images: np.ndarray) -> Tensor:
        with torch.no_grad(), products(tf32=False):
            return self.network(images).float().cpu()


@dataclass(frozen=True)
class Source:
    """A row of the table: how a network is loaded, how pictures are resized for it, and the origin of its weights.

    load: (row, name, weights, device, seed) -> Features. weights: "" = those of `origin`. seed >= 0: random weights.
    """

    load: Callable[[Source, str, str, torch.device, int], Features]
    resize: str
    width: int
    origin: str


def democlip(source: Source, name: str, weights: str, device: torch.device, seed: int) -> Features:
    """Image embeddings, not normalised, of the CLIP that ships with latentmill and was trained on captioned shapes."""
    if weights:
        raise ConfigError(f"features={name} has its own weights: leave features_weights out")
    tower = load_text(EncodersConfig(seed=seed), device)

    def network(images: np.ndarray) -> Tensor:
        return tower.encode_image(from_uint8(images))

    return Features(name, tower.image_sha256, tower.embed_dim, network, source.resize)


def inception(source: Source, name: str, weights: str, device: torch.device, seed: int) -> Features:
    """The pool features of FID's Inception-v3, from pytorch-fid's .pth, of which only tensors are read, or a
    .safetensors."""
    network = _with_weights(Inception(), name, weights or source.origin, seed).to(device)
    resize = RESIZES[source.resize]

    def features(images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
        return network(resize(x, SIDE))

    return Features(name, _hash(network), WIDTH, features, source.resize, network.fc.weight.detach().cpu())


def clip(source: Source, name: str, weights: str, device: torch.device, seed: int) -> Features:
    """Image embeddings, not normalised, of OpenAI's CLIP in open_clip, by open_clip's own transform of pictures.

    weights: a .safetensors file, or a folder with open_clip_config.json and open_clip_model.safetensors."""
    if weights and Path(weights).expanduser().is_dir():
        config = EncodersConfig(text=weights, seed=seed)
    else:
        path = str(weights_file(weights)) if weights else "openai"
        config = EncodersConfig(text=source.origin, text_pretrained=path, text_pad=0, text_length=77, seed=seed)
    tower = load_text(config, device)
    if tower.embed_dim != source.width:
        raise WeightsError(f"features={name} has {source.width} channels; {weights} gives {tower.embed_dim}")
    return Features(name, tower.image_sha256, source.width, tower.encode_pictures, source.resize)


def dinov2(source: Source, name: str, weights: str, device: torch.device, seed: int) -> Features:
    """The class token after the last norm of DINOv2 (Oquab et al. 2023) through timm, at 224 pixels."""
    declare_torchvision_ops()
    import timm
    from timm.data import create_transform, resolve_model_data_config

    fetch = seed < 0 and not weights
    options: dict[str, Any] = {"num_classes": 0, "img_size": 224}
    try:
        with quiet_hub_clients():
            network = timm.create_model(source.origin, pretrained=fetch, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise WeightsError(
            f"features={name}: timm cannot fetch {source.origin} ({hub_error(error)}). Bring its model.safetensors "
            "here by hand, and give features_weights=FILE"
        ) from error
    if weights:
        network = _with_weights(network, name, weights, seed)
    network = network.to(device).eval().requires_grad_(False)
    facts = resolve_model_data_config(network) | {"input_size": (3, 224, 224), "crop_pct": 1.0}
    transform = create_transform(**facts, is_training=False)
    from PIL import Image

    def features(images: np.ndarray) -> Tensor:
        return network(torch.stack([transform(Image.fromarray(image)) for image in images]).to(device))

    return Features(name, _hash(network), source.width, features, source.resize)


FEATURES: dict[str, Source] = {
    "democlip": Source(democlip, "bicubic, antialiased", 64, "shipped"),
    "inception": Source(inception, "tensorflow", WIDTH, INCEPTION_URL),
    "inception_pytorch": Source(inception, "pytorch", WIDTH, INCEPTION_URL),
    "inception_clean": Source(inception, "clean", WIDTH, INCEPTION_URL),
    "clip_b32": Source(clip, "open_clip", 512, "ViT-B-32-quickgelu"),
    "clip_l14": Source(clip, "open_clip", 768, "ViT-L-14-quickgelu"),
    "clip_l14_336": Source(clip, "open_clip", 768, "ViT-L-14-336-quickgelu"),
    "dinov2_s14": Source(dinov2, "timm at 224", 384, "vit_small_patch14_dinov2.lvd142m"),
    "dinov2_l14": Source(dinov2, "timm at 224", 1024, "vit_large_patch14_dinov2.lvd142m"),
}
"""The networks by name. FID is defined with `inception`; CMMD with `clip_l14_336`."""


def load_features(name: str, device: torch.device | str = "cpu", seed: int = -1, weights: str = "") -> Features:
    """The feature network of that name. weights: file, folder or URL, "" = where they were published. seed >= 0:
    random weights (tests). Raises ConfigError for an unknown name, WeightsError."""
    if name not in FEATURES:
        raise ConfigError(f"features={name}: choose one of {', '.join(FEATURES)}")
    source = FEATURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(seed, 0))
        return source.load(source, name, weights, torch.device(device), seed)


def _with_weights(network: Any, name: str, weights: str, seed: int) -> Any:
    """The network with the weights of a file or, for seed >= 0, random ones; in evaluation mode."""
    if seed >= 0:
        if isinstance(network, Inception):
            network.randomize(seed)
    else:
        path = weights_file(weights)
        try:
            network.load_state_dict(read_file(path)[0])
        except RuntimeError as error:
            raise WeightsError(f"features={name}: {path} holds another architecture: {str(error)[:300]}") from None
    return network.eval().requires_grad_(False)


def _hash(network: torch.nn.Module) -> str:
    """The weights' hash, whatever file they were in."""
    return weights_hash(item for item in network.state_dict().items() if not item[0].endswith("num_batches_tracked"))
