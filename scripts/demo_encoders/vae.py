"""The demo autoencoder, f = 8, from 64x64x3 to 8x8x4: `latentmill autoencoder` with a preset and further losses.

The preset has kl_small's architecture. Beside what the verb minimizes, latents are made easy for a small denoiser:
nearly linear in colour, of unit spread, telling of colour and shape, and decoded well with some noise on them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_encoders.data import EVAL_SEED, IMAGES, TRAIN_SEED, as_input, pictures, save_half, save_json
from pipeline import autoencoder, cli
from pipeline.config.loading.load import load
from pipeline.models.encoders.packages import AutoencoderKL
from pipeline.models.first_stage.trainable import Outputs
from preprocess.shapes.captions import COLOURS, SHAPES
from preprocess.shapes.shards import write_shards

STEPS = 3000  # 35.2 dB; 2000 give 33.3, and the weights that ship have 34.2 (seed 0)
BATCH = 16
LABELS = "cond.labels"
# The weight of the KL is that of the ELBO of a Gaussian decoder whose variance s is about the expected squared error of
# a pixel value: 2 s per pixel value, 0.0144 for s = 0.0072.
PRESET = [
    "autoencoder=kl_small",
    "loss.l1=0.05",
    "loss.l2=1.0",
    "loss.kl=0.0144",
    f"optim.batch={BATCH}",
    "optim.lr=2e-3",
    "optim.betas=[0.9,0.98]",
    "optim.weight_decay=0.02",
    f"optim.warmup={100 * BATCH}",
    "optim.decay=cosine",
    f"ema.half_life={346 * BATCH}",
    "deepspeed=off",
    "device=cpu",
    "tracking.wandb=off",
]
NOISE = 0.2  # standard deviation of latent noise, beyond that of the posterior, that the decoder learns to tolerate
# Weight of the squared error of a linear map from the four latent numbers of a cell to the mean colour of its pixels.
# Stable Diffusion's latents happen to be nearly linear in colour; here this is enforced, because a small denoiser
# learns such latents many times faster than a code in which neighbouring colours may be far apart.
COLOUR_WEIGHT = 0.3
SPREAD_WEIGHT = 0.02  # keeps every latent channel near mean 0 and variance 1, so that none dies or dominates
MEANING_WEIGHT = 0.02  # makes each latent cell predict colour and shape of the object that it is part of
OWNED = 0.25  # share of the 8 x 8 pixels of a cell that makes it part of an object


class DemoLosses(nn.Module):
    """The further losses: colour, spread and meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Conv2d(4, 3, 1)
        self.meaning = nn.Sequential(nn.Conv2d(4, 64, 1), nn.SiLU(), nn.Conv2d(64, len(COLOURS) + len(SHAPES), 1))

    def forward(self, outputs: Outputs, x_B3HW: Tensor, members: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses. members: label maps (B, 64, 64), 0 for the background."""
        assert outputs.moments is not None
        z = outputs.z
        coarse = (self.colour(z).float() - F.avg_pool2d(x_B3HW, 8)).square().mean()
        channels = outputs.moments.chunk(2, dim=1)[0].transpose(0, 1).flatten(1)
        spread = channels.mean(dim=1).square() + (channels.var(dim=1) + 1e-4).log().square()
        owner = cell_owners(members[LABELS])
        of_colour = torch.where(owner > 0, (owner - 1) % len(COLOURS), -1)
        of_shape = torch.where(owner > 0, (owner - 1) // len(COLOURS), -1)
        named_colour, named_shape = self.meaning(z).float().split([len(COLOURS), len(SHAPES)], dim=1)
        named = F.cross_entropy(named_colour, of_colour, ignore_index=-1)
        named = named + F.cross_entropy(named_shape, of_shape, ignore_index=-1)
        return {
            "coarse": COLOUR_WEIGHT * coarse,
            "spread": SPREAD_WEIGHT * spread.mean(),
            "named": MEANING_WEIGHT * named,
        }

    def reset_parameters(self, seed: int) -> None:
        """Initialize; one seed gives the same weights on every machine."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                for parameter in module.parameters():
                    parameter.data.uniform_(-1, 1, generator=generator).div_(module.in_channels**0.5)


def cell_owners(labels_BHW: Tensor) -> Tensor:
    """Label maps (B, 64, 64) -> (B, 8, 8) int64: the label that covers most of a latent cell, 0 if it covers less than
    OWNED."""
    cells = labels_BHW.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).long()
    counts = F.one_hot(cells, len(COLOURS) * len(SHAPES) + 1).sum(dim=3)[..., 1:]
    most, label = counts.max(dim=-1)
    return torch.where(most >= OWNED * 64, label + 1, 0)


def train(folder: Path, seed: int, steps: int, images: int = IMAGES) -> dict[str, float]:
    """Draws pictures, trains the autoencoder, saves it to `folder` and returns its figures on unseen pictures."""
    threads = f"launch.threads={torch.get_num_threads()}"
    with tempfile.TemporaryDirectory(prefix="demo-vae-") as work:
        write_shards(f"{work}/shapes", images, TRAIN_SEED, "all", shard_size=2000)
        cached = ["stored=pixels", "conditions=[labels]", "labels.grid=1", f"labels.count={1 + 24}"]
        _must("encode", f"source={work}/shapes/*.tar", f"dest={work}/pixels", *cached, threads)
        words = [f"data.train={work}/pixels", f"run={work}/run", f"samples={steps * BATCH}", f"seed={seed}"]
        config = load("autoencoder", [*PRESET, *words, threads, f"checkpoint.every={steps * BATCH}"])
        autoencoder.main(config, autoencoder.Further(DemoLosses, (LABELS,), NOISE))
        _must("export", f"run={work}/run", f"dest={work}/vae")
        save(Path(work) / "vae", folder)
    return measure(folder)


def _must(*words: str) -> None:
    """Run a command line of latentmill."""
    if cli.main(list(words)):
        raise SystemExit(f"latentmill {words[0]} failed")


def save(exported: Path, folder: Path) -> None:
    """Writes an exported autoencoder with weights of half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = AutoencoderKL.from_pretrained(exported)
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    save_json({name: value for name, value in config.items() if name != "_diffusers_version"}, folder / "config.json")
    save_half(model, folder / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def measure(folder: Path, count: int = 512) -> dict[str, float]:
    """Computes figures of the saved autoencoder on `count` unseen pictures.

    psnr: mean over pictures of the PSNR in dB of the uint8 reconstruction from the posterior mode. psnr_noisy: the same
    with noise of 0.2 latent standard deviations added to the mode.
    """
    model: Any = AutoencoderKL.from_pretrained(folder).eval()
    images, _ = pictures(EVAL_SEED, count)
    generator = torch.Generator().manual_seed(1)
    modes, posterior_std, psnr, noisy = [], [], [], []
    scale = model.config.scaling_factor
    for i in range(0, count, 64):
        batch = images[i : i + 64]
        posterior = model.encode(as_input(batch)).latent_dist
        modes.append(posterior.mode())
        posterior_std.append(posterior.std)
        psnr.append(picture_psnr(model.decode(posterior.mode()).sample, batch))
        noise = torch.randn(posterior.mean.shape, generator=generator) * 0.2 / scale
        noisy.append(picture_psnr(model.decode(posterior.mode() + noise).sample, batch))
    z = torch.cat(modes)
    figures = {
        "psnr": float(torch.cat(psnr).mean()),
        "psnr_noisy": float(torch.cat(noisy).mean()),
        "scaling_factor": scale,
        "posterior_std_scaled": float(torch.cat(posterior_std).mean() * scale),
    }
    for channel in range(z.shape[1]):
        figures[f"channel_{channel}_mean_scaled"] = float(z[:, channel].mean() * scale)
        figures[f"channel_{channel}_std_scaled"] = float(z[:, channel].std() * scale)
    return {name: round(value, 4) for name, value in figures.items()}


def to_uint8(decoded: Tensor) -> np.ndarray:
    """Decoder output (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return decoded.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def picture_psnr(decoded: Tensor, truth: np.ndarray) -> Tensor:
    """PSNR in dB of each picture (B,), peak 255, after rounding to uint8."""
    error = to_uint8(decoded).astype(np.float64) - truth
    return torch.from_numpy(10 * np.log10(255**2 / np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-10)))
