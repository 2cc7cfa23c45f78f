"""Settings of samplers, and networks whose exact outputs are known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.diffusion.conditioning import Conditioning

CONFIG = DiffusionConfig()
ZERO_SNR = replace(CONFIG, prediction="v", zero_terminal_snr=True)
FLOW = replace(CONFIG, prediction="flow")
EDM = replace(CONFIG, prediction="edm", timestep_density="log_normal")
LATENT = (4, 8, 8)
NUMBERS = torch.arange(3)


def network(x: Tensor, timestep_B: Tensor, conditioning: Conditioning | None = None) -> Tensor:
    """A fixed nonlinear function of latent, timestep and context that replaces a network."""
    shift = torch.zeros(())
    if conditioning is not None and conditioning.context is not None:
        shift = conditioning.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    level = timestep_B.view(-1, 1, 1, 1) / 1000
    return torch.sin(x.roll(1, dims=-1)) * (0.3 + 0.7 * level) + 0.2 * x + shift


CASES = {
    "epsilon": CONFIG,
    "v": replace(CONFIG, prediction="v"),
    "x0": replace(CONFIG, prediction="x0"),
    "cosine-epsilon": replace(CONFIG, schedule="cosine"),
    "cosine-v": replace(CONFIG, schedule="cosine", prediction="v"),
    "zero_snr-v": ZERO_SNR,
    "zero_snr-x0": replace(ZERO_SNR, prediction="x0"),
    "zero_snr-cosine": replace(ZERO_SNR, schedule="cosine"),
    "flow": FLOW,
    "edm": EDM,
    "edm-1": replace(EDM, sigma_data=1.0, sigma_max=160.0, sigma_min=0.004),
}


def conditionings() -> tuple[Conditioning, Conditioning]:
    g = torch.Generator().manual_seed(0)
    return Conditioning(torch.randn(3, 5, 16, generator=g)), Conditioning(torch.zeros(3, 5, 16))
