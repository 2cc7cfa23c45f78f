"""Makes small first stages as diffusers writes them, with seeded random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.models.encoders.first_stage import KLStage

VQ: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "num_vq_embeddings": 32,
}


def vq_folder(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """Writes a VQModel by diffusers' own save_pretrained. without: keys that its config.json then lacks, as files have
    that were written before these keys were. Entries of the codebook lie as far apart as latents do, so that
    quantisation changes what is decoded; pictures differ from grey."""
    from pipeline.models.encoders.packages import VQModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = VQModel(**{**VQ, "scaling_factor": 1.0, **changes})
        with torch.no_grad():
            model.quantize.embedding.weight.normal_()
            model.quant_conv.weight.mul_(3)
            model.decoder.conv_out.weight.mul_(4)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def kl_stage(**changes: Any) -> KLStage:
    """A KLStage of seeded random weights, whose norms scale and shift."""
    from pipeline.models.encoders.packages import AutoencoderKL

    described = {name: value for name, value in VQ.items() if name != "num_vq_embeddings"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model: Any = AutoencoderKL(**{**described, "scaling_factor": 0.7, **changes})
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.GroupNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
            model.decoder.conv_out.weight.mul_(3)
    return KLStage(model, torch.float32, torch.device("cpu"))
