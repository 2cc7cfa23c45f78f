"""What the network predicts: the target that it is trained on, and the x_0 that its prediction implies.

Functions take tensors that broadcast together, or floats for alpha and sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig

Number = Tensor | float


@dataclass(frozen=True)
class Prediction:
    """The meaning of a network's output.

    target(x_0, noise, alpha, sigma); to_x0(output, x, alpha, sigma); scale(x, sigma): x as the network is given it.
    """

    target: Callable[[Tensor, Tensor, Any, Any], Tensor]
    to_x0: Callable[[Tensor, Tensor, Any, Any], Tensor]
    scale: Callable[[Tensor, Any], Tensor] = lambda x, sigma: x


def add_noise(x0: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """A sample of q(x_t | x_0) (Ho et al. 2020, equation 4)."""
    return alpha * x0 + sigma * noise


def to_eps(x0: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """The noise that takes x_0 to x."""
    return (x - alpha * x0) / sigma


def epsilon(config: DiffusionConfig) -> Prediction:
    """The noise (Ho et al. 2020, equation 14)."""

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return (x - sigma * output) / alpha

    return Prediction(lambda x0, noise, alpha, sigma: noise, to_x0)


def v(config: DiffusionConfig) -> Prediction:
    """alpha noise - sigma x_0 (Salimans & Ho 2022, appendix D)."""

    def target(x0: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return alpha * noise - sigma * x0

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return alpha * x - sigma * output

    return Prediction(target, to_x0)


def x0(config: DiffusionConfig) -> Prediction:
    """x_0 itself (Salimans & Ho 2022, section 4)."""
    return Prediction(lambda x0, noise, alpha, sigma: x0, lambda output, x, alpha, sigma: output)


def flow(config: DiffusionConfig) -> Prediction:
    """The velocity noise - x_0 of rectified flow, where alpha + sigma = 1 (Liu et al. 2022, equation 1; Esser et al.
    2024, equation 13; here from data to noise)."""

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return x - sigma * output

    return Prediction(lambda x0, noise, alpha, sigma: noise - x0, to_x0)


def edm(config: DiffusionConfig) -> Prediction:
    """The F of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), where D is x_0 (Karras et al. 2022, equation 7 and
    table 1, with s = sigma_data):

    c_skip = s^2 / (sigma^2 + s^2)    c_out = sigma s / sqrt(sigma^2 + s^2)    c_in = 1 / sqrt(sigma^2 + s^2)

    Their loss weight 1 / c_out^2 makes lambda ||D - x_0||^2 the plain ||F - target||^2 (equation 8).
    """
    s = config.sigma_data

    def root(sigma: Number) -> Number:
        return (sigma**2 + s**2) ** 0.5

    def target(x0: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
        # (x_0 - c_skip x) / c_out, without the difference of two almost equal numbers at small sigma
        return (sigma * x0 - s**2 * noise) / (s * root(sigma))

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return s**2 / root(sigma) ** 2 * x + sigma * s / root(sigma) * output

    return Prediction(target, to_x0, lambda x, sigma: x / root(sigma))


PREDICTIONS: dict[str, Callable[[DiffusionConfig], Prediction]] = {
    "epsilon": epsilon,
    "v": v,
    "x0": x0,
    "flow": flow,
    "edm": edm,
}


def make_prediction(config: DiffusionConfig) -> Prediction:
    """What the network of a configuration predicts."""
    return PREDICTIONS[config.prediction](config)


# --------------------------------------------------------------------------------------------------------------------
# Loss weights


def min_snr_weight(prediction: str, gamma: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    """min(SNR, gamma) as a weight of x_0's squared error, in terms of what is predicted: divided by SNR for epsilon and
    by SNR + 1 for v (Hang et al. 2023, section 3.4). SNR = alpha^2 / sigma^2, alpha^2 + sigma^2 = 1, sigma > 0."""
    signal, noise = alpha**2, sigma**2
    if prediction == "epsilon":
        return torch.clamp(gamma * noise / signal, max=1.0)
    if prediction == "v":
        return torch.minimum(signal, gamma * noise)
    assert prediction == "x0", f"no min-SNR weight for {prediction}"
    return torch.clamp(signal / noise, max=gamma)
