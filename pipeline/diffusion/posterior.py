"""Sampling from the autoencoder's posterior: from stored moments and noise to a scaled latent."""

from __future__ import annotations

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # the clamp that the autoencoders were trained with


def sample_posterior(moments: Tensor, noise: Tensor | None, scale: float, shift: float) -> Tensor:
    """Moments (B, 2C, h, w) and standard normal noise (B, C, h, w) -> scaled latents (B, C, h, w), float32.

    noise=None: the posterior's mode.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise
    return (mean - shift) * scale
