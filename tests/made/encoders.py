"""Small encoders of the real architectures with random weights, and helpers for tests of fetching."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline import config as c
from pipeline.fetch import main
from pipeline.models.encoders import tokenizer
from pipeline.models.encoders.autoencoder import load_autoencoder, load_network
from pipeline.models.encoders.text import load_text
from pipeline.models.encoders.tokenizer import load_tokenizer
from pipeline.storage.urls import open_storage

CAPTIONS = ["a large red circle left of a small blue square", "", "Un café 日本語 🎨 <end_of_text>"]
FILES = [
    "encoders.json",
    "text/bpe.txt.gz",
    "text/open_clip_config.json",
    "text/open_clip_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
VAE: dict[str, Any] = {  # a small version of Stable Diffusion's, with the shift of version 3
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.4,
    "shift_factor": 0.2,
}


def small_clip(name: str) -> dict[str, Any]:
    """An architecture of open_clip's list with an eighth of its width and two layers."""
    architecture = json.loads((tokenizer._open_clip() / "model_configs" / f"{name}.json").read_text())
    text, vision = architecture["text_cfg"], architecture["vision_cfg"]
    text |= {"width": text["width"] // 8, "heads": text["heads"] // 4, "layers": 2}
    vision |= {"image_size": 28, "width": vision["width"] // 8, "layers": 1, "head_width": 16}
    return architecture | {"embed_dim": 32}


def make_sources(where: Path) -> Path:
    """Writes a user's own encoders: vae/ and the towers ViT-L-14/ and ViT-H-14/."""
    (where / "vae").mkdir()
    (where / "vae" / "config.json").write_text(json.dumps(VAE))
    stage = load_network(c.EncodersConfig(vae=str(where / "vae"), seed=5))
    state = {name: tensor.half() for name, tensor in stage.model.state_dict().items()}  # like many published weights
    save_file(state, where / "vae" / "diffusion_pytorch_model.safetensors")
    half = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}
    for name in ("ViT-L-14", "ViT-H-14"):
        folder = where / name
        folder.mkdir()
        model_cfg = small_clip(name) | {"quick_gelu": name == "ViT-L-14"}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": half}))
        tower = load_text(c.EncodersConfig(text=str(folder), text_length=77, seed=7))
        save_file(tower.model.state_dict(), folder / "open_clip_model.safetensors")
    return where


def own(sources: Path, **changes: Any) -> c.EncodersConfig:
    fields: dict[str, Any] = {
        "name": "own",
        "vae": str(sources / "vae"),
        "text": str(sources / "ViT-L-14"),
        "text_length": 77,
    }
    return c.EncodersConfig(**(fields | {"text_pad": 49407} | changes))


def fetch(encoders: c.EncodersConfig, dest: object) -> dict[str, Any]:
    """Runs `latentmill fetch`. Returns its manifest."""
    assert main(c.FetchConfig(encoders=encoders, dest=str(dest))) == 0
    return json.loads(open_storage(str(dest)).get("encoders.json"))


def with_weights(encoders: c.EncodersConfig, weights: object) -> c.EncodersConfig:
    return dataclasses.replace(encoders, weights=str(weights), seed=-1)


def assert_same_encoders(ours: c.EncodersConfig, theirs: c.EncodersConfig) -> None:
    """Asserts equal hashes of weights, equal ids, and outputs that are equal to the bit."""
    stage, their_stage = load_autoencoder(ours), load_autoencoder(theirs)
    assert stage.weights_sha256 == their_stage.weights_sha256
    assert (stage.scale, stage.shift, stage.downsampling) == (
        their_stage.scale,
        their_stage.shift,
        their_stage.downsampling,
    )
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    moments = stage.encode(x)
    assert torch.equal(moments, their_stage.encode(x))
    z = moments[:, : stage.latent_channels]
    assert torch.equal(stage.decode(z), their_stage.decode(z))
    tower, their_tower = load_text(ours), load_text(theirs)
    assert (tower.weights_sha256, tower.image_sha256) == (their_tower.weights_sha256, their_tower.image_sha256)
    ids = tower.tokenize(CAPTIONS)
    assert torch.equal(ids, their_tower.tokenize(CAPTIONS))
    assert [load_tokenizer(theirs).ids(caption)[0] for caption in CAPTIONS] == ids.tolist()
    assert torch.equal(tower.encode(ids), their_tower.encode(ids))
    assert torch.equal(tower.pooled(ids), their_tower.pooled(ids))
    assert torch.equal(tower.encode_image(x), their_tower.encode_image(x))
