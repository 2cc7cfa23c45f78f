"""The demo autoencoder: diffusers' AutoencoderKL with f = 8, from 64x64x3 to 8x8x4 (Rombach et al. 2021, section
3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from demo_encoders.data import (
    EVAL_SEED,
    IMAGES,
    TRAIN_SEED,
    Average,
    as_input,
    optimise,
    pictures,
    save_half,
    save_json,
)
from preprocess.shapes.captions import COLOURS, SHAPES
from preprocess.shapes.drawing import label_map

ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 16, 32, 96],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
    "force_upcast": False,
}
STEPS = 2000
BATCH = 16
LR = 2e-3
# Weight of the mean KL per latent number relative to the mean squared error per pixel value. For the ELBO of a Gaussian
# decoder whose variance s is about the expected error it is 2 s (256 latent numbers / 12288 pixel values): 2e-4 for
# s = 0.005.
KL_WEIGHT = 3e-4
NOISE = 0.2  # standard deviation of latent noise, beyond that of the posterior, that the decoder learns to tolerate
L1_WEIGHT = 0.05
# Weight of the squared error of a linear map from the four latent numbers of a cell to the mean colour of its pixels.
# Stable Diffusion's latents happen to be nearly linear in colour; here this is enforced, because a small denoiser
# learns such latents many times faster than a code in which neighbouring colours may be far apart.
COLOUR_WEIGHT = 0.3
SPREAD_WEIGHT = 0.02  # keeps every latent channel near mean 0 and variance 1, so that none dies or dominates
MEANING_WEIGHT = 0.02  # makes each latent cell predict colour and shape of the object that it is part of
OWNED = 0.25  # share of the 8 x 8 pixels of a cell that makes it part of an object


def train(folder: Path, seed: int, steps: int, every_minutes: float) -> dict[str, float]:
    """Trains the autoencoder, saves it to `folder` and returns its figures on unseen pictures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, scenes = pictures(TRAIN_SEED, IMAGES)
    owners = np.stack([cell_owners(label_map(truth)) for truth in scenes])
    model: Any = AutoencoderKL(**ARCHITECTURE)  # diffusers has no types
    print(f"autoencoder: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    meaning = nn.Sequential(nn.Conv2d(4, 64, 1), nn.SiLU(), nn.Conv2d(64, len(COLOURS) + len(SHAPES), 1))
    average = Average(model, decay=0.998)
    colour = torch.nn.Conv2d(4, 3, 1)  # used in training only

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = rng.integers(len(images), size=BATCH)
        x, owner = as_input(images[chosen]), torch.from_numpy(owners[chosen]).long()
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.quant_conv(model.encoder(x)).float().chunk(2, dim=1)
            logvar = logvar.clamp(-12, 4)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)  # to the standard normal
            z = mean + (logvar.exp() + NOISE**2).sqrt() * torch.randn_like(mean)
            y = model.decode(z).sample.float()
        error = y - x
        mse = error.square().mean()
        coarse = (colour(z) - torch.nn.functional.avg_pool2d(x, 8)).square().mean()
        loss = mse + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl.mean() + COLOUR_WEIGHT * coarse
        channels = mean.transpose(0, 1).flatten(1)
        spread = channels.mean(dim=1).square() + (channels.var(dim=1) + 1e-4).log().square()
        of_colour = torch.where(owner > 0, (owner - 1) % len(COLOURS), -1)
        of_shape = torch.where(owner > 0, (owner - 1) // len(COLOURS), -1)
        named_colour, named_shape = meaning(z).split([len(COLOURS), len(SHAPES)], dim=1)
        named = F.cross_entropy(named_colour, of_colour, ignore_index=-1)
        named = named + F.cross_entropy(named_shape, of_shape, ignore_index=-1)
        loss = loss + SPREAD_WEIGHT * spread.mean() + MEANING_WEIGHT * named
        with torch.no_grad():
            figures = {
                "named": named,
                "spread": spread.mean(),
                "psnr": 10 * torch.log10(4 / mse),
                "coarse": coarse,
                "kl": kl.mean(),
                "std": logvar.mul(0.5).exp().mean(),
            }
        return loss, {name: value.item() for name, value in figures.items()}

    def keep(step: int) -> None:
        save(model, folder)
        print(f"provisional at step {step}: {measure(folder)}", flush=True)

    optimise(
        model,
        [*model.parameters(), *colour.parameters(), *meaning.parameters()],
        loss_of_step,
        steps=steps,
        lr=LR,
        average=average,
        every_minutes=every_minutes,
        provisional=keep,
    )
    save(model, folder)
    return measure(folder)


def cell_owners(labels: np.ndarray) -> np.ndarray:
    """Label map (64, 64) -> (8, 8) uint8: the label that covers most of a latent cell, 0 if it covers less than
    OWNED."""
    cells = labels.reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(8, 8, 64)
    counts = np.stack([(cells == label).sum(axis=2) for label in range(1, 25)])
    return np.where(counts.max(axis=0) >= OWNED * 64, counts.argmax(axis=0) + 1, 0).astype(np.uint8)


def save(model: Any, folder: Path) -> None:
    """Writes weights and config.json with the scaling factor that gives sampled latents a standard deviation of 1."""
    images, _ = pictures(TRAIN_SEED, 1024)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        batches = [model.encode(as_input(images[i : i + 64])).latent_dist.sample(generator) for i in range(0, 1024, 64)]
    scale = round(1 / float(torch.cat(batches).std()), 5)
    config = {"_class_name": "AutoencoderKL", **ARCHITECTURE, "scaling_factor": scale}
    folder.mkdir(parents=True, exist_ok=True)
    save_json(config, folder / "config.json")
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


def to_uint8(decoded: torch.Tensor) -> np.ndarray:
    """Decoder output (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return decoded.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def picture_psnr(decoded: torch.Tensor, truth: np.ndarray) -> torch.Tensor:
    """PSNR in dB of each picture (B,), peak 255, after rounding to uint8."""
    error = to_uint8(decoded).astype(np.float64) - truth
    return torch.from_numpy(10 * np.log10(255**2 / np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-10)))
