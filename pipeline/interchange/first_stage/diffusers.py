"""`latentmill export format=diffusers` of an autoencoder: a folder that diffusers' AutoencoderKL or VQModel loads, and
that encoders.vae= takes.

    config.json  diffusion_pytorch_model.safetensors  README.md  latentmill.json  SHA256SUMS
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline import philox
from pipeline.config import ExportConfig
from pipeline.inference.first_stage import TrainedAutoencoder
from pipeline.interchange.agreement import ExportDiffers, compare
from pipeline.interchange.first_stage.scale import Scale, measure
from pipeline.interchange.folder import MARKER, README, WEIGHTS, Destination
from pipeline.interchange.hub.card import card
from pipeline.log import show
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.first_stage.architecture import diffusers_config
from pipeline.models.first_stage.codebook import quantise
from pipeline.models.weights import save_tensors
from pipeline.storage.staging import staging_folder, writing

CONFIG = "config.json"
CHECKED = 2
"""Pictures of noise whose reconstructions are compared."""
TEXT = """Exported by latentmill {version} from {weights} weights of an autoencoder at {n:,} samples seen.

diffusers' {name}: f = {f} ({f} pixels per latent position, along a side), latents of {channels} channels. {scale}

```python
from diffusers import {name}

vae = {name}.from_pretrained(folder)
{encode}
images = vae.decode(z / vae.config.scaling_factor).sample{decode}
```

`latentmill encode encoders.vae=FOLDER` caches latents of it.
"""
ENCODE = {
    "kl": "z = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor  # images (B, 3, H, W) in [-1, 1]",
    "vq": "z = vae.encode(images).latents * vae.config.scaling_factor  # images (B, 3, H, W) in [-1, 1]",
}
DECODE = {"kl": "", "vq": "  # which quantises first"}


def export_autoencoder(config: ExportConfig, trained: TrainedAutoencoder, dest: Destination) -> None:
    """Write the folder: every file of it is whole before the first is published. Raises RunError where the scale of
    latents cannot be measured, before anything is written."""
    scale = measure(trained, config.scale_images)
    described = describe(trained, scale)
    with staging_folder(dest.storage) as folder:
        _write(folder / CONFIG, json.dumps(described, indent=2, sort_keys=True) + "\n")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
        save_tensors(state, folder / WEIGHTS)
        text = readme(trained, scale)
        _write(folder / README, card(config, trained, text) if config.push else text)
        facts = {
            "weights": trained.weights,
            "n": trained.n,
            "version": pipeline.__version__,
            "contract": trained.info.contract,
            "scale_images": scale.images,
        }
        _write(folder / MARKER, json.dumps(facts, indent=2, sort_keys=True) + "\n")
        if config.check:
            check(folder, trained)
        dest.publish(folder)
    show(f"export: {scale.words()}")


def describe(trained: TrainedAutoencoder, scale: Scale) -> dict[str, Any]:
    """config.json."""
    import diffusers

    side = trained.info.config.crop or trained.contract.resolution
    described = diffusers_config(trained.config, scale.factor, side)
    return described | {"_diffusers_version": diffusers.__version__}


def readme(trained: TrainedAutoencoder, scale: Scale) -> str:
    """README.md."""
    config = trained.config
    return TEXT.format(
        version=pipeline.__version__,
        weights=trained.weights,
        n=trained.n,
        name=diffusers_config(config)["_class_name"],
        f=config.downsampling,
        channels=config.latent_channels,
        scale=scale.words(),
        encode=ENCODE[config.regularizer],
        decode=DECODE[config.regularizer],
    )


@torch.no_grad()
def check(folder: Path, trained: TrainedAutoencoder) -> None:
    """Load the folder with diffusers and compare latents and reconstructions. Raises ExportDiffers.

    Codes are chosen by our latents alone: where two are equally near, the last bit of a latent decides.
    """
    declare_torchvision_ops()
    import diffusers

    ours, config = trained.model, trained.config
    cls = getattr(diffusers, diffusers_config(config)["_class_name"])
    theirs = cls.from_pretrained(folder, local_files_only=True).eval().to(next(ours.parameters()).device)
    side = max(4 * config.downsampling, 64)
    x = philox.uniform(0, philox.Stream.NOISE, torch.arange(CHECKED), 3 * side * side).float() * 2 - 1
    x = x.view(CHECKED, 3, side, side).to(theirs.device)
    if config.regularizer == "kl":
        mean = ours.encode(x).latent_dist.mean
        compare("the latents", theirs.encode(x).latent_dist.mean, mean)
        compare("the reconstructions", theirs.decode(mean).sample, ours.decode(mean).sample)
        return
    h = ours.encode(x).latents
    compare("the latents", theirs.encode(x).latents, h)
    codebook = ours.quantize.embedding.weight
    if not torch.equal(theirs.quantize.embedding.weight, codebook):
        raise ExportDiffers("the codebooks differ; nothing was written to the destination")
    z = quantise(h, codebook).z_q
    pairs = (model.decode(z, force_not_quantize=True).sample for model in (theirs, ours))
    compare("the reconstructions", *pairs)


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8")
