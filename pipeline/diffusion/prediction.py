"""Parameterizations: the target that the network is trained on, and the x_0 that its output implies.

Functions take tensors that broadcast together; alpha and sigma may be floats.
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
    """One parameterization of the network.

    target(x_0, noise, alpha, sigma): what its output is compared with. to_x0(output, x, alpha, sigma): the x_0 that its
    output implies. scale(x, sigma): its input, made of x.
    """

    target: Callable[[Tensor, Tensor, Any, Any], Tensor]
    to_x0: Callable[[Tensor, Tensor, Any, Any], Tensor]
    scale: Callable[[Tensor, Any], Tensor] = lambda x, sigma: x


def add_noise(x0: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """A sample of q(x_t | x_0) (Ho et al. 2020, equation 4)."""
    return alpha * x0 + sigma * noise


def to_eps(x0: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """The noise for which x = alpha x_0 + sigma noise."""
    return (x - alpha * x0) / sigma


def epsilon(config: DiffusionConfig) -> Prediction:
    """The network predicts the noise (Ho et al. 2020, equation 14)."""

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return (x - sigma * output) / alpha

    return Prediction(lambda x0, noise, alpha, sigma: noise, to_x0)


def v(config: DiffusionConfig) -> Prediction:
    """The network predicts alpha noise - sigma x_0 (Salimans & Ho 2022, appendix D)."""

    def target(x0: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return alpha * noise - sigma * x0

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return alpha * x - sigma * output

    return Prediction(target, to_x0)


def x0(config: DiffusionConfig) -> Prediction:
    """The network predicts x_0 (Salimans & Ho 2022, section 4)."""
    return Prediction(lambda x0, noise, alpha, sigma: x0, lambda output, x, alpha, sigma: output)


def flow(config: DiffusionConfig) -> Prediction:
    """The network predicts the velocity noise - x_0 of rectified flow, where alpha + sigma = 1 (Liu et al. 2022,
    equation 1; Esser et al. 2024, equation 13; here from data to noise)."""

    def to_x0(output: Tensor, x: Tensor, alpha: Number, sigma: Number) -> Tensor:
        return x - sigma * output

    return Prediction(lambda x0, noise, alpha, sigma: noise - x0, to_x0)


def edm(config: DiffusionConfig) -> Prediction:
    """The network is F of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), where D predicts x_0 (Karras et al. 2022,
    equation 7 and table 1, with s = sigma_data):

    c_skip = s^2 / (sigma^2 + s^2)    c_out = sigma s / sqrt(sigma^2 + s^2)    c_in = 1 / sqrt(sigma^2 + s^2)

    With their loss weight lambda = 1 / c_out^2, lambda ||D - x_0||^2 equals ||F - target||^2 (equation 8).
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
    """The parameterization of a configuration."""
    return PREDICTIONS[config.prediction](config)


# --------------------------------------------------------------------------------------------------------------------
# Loss weights


def min_snr_weight(prediction: str, gamma: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The weight min(SNR, gamma) of x_0's squared error, converted to the predicted quantity: divided by SNR for
    epsilon and by SNR + 1 for v (Hang et al. 2023, section 3.4). SNR = alpha^2 / sigma^2, alpha^2 + sigma^2 = 1,
    sigma > 0."""
    signal, noise = alpha**2, sigma**2
    if prediction == "epsilon":
        return torch.clamp(gamma * noise / signal, max=1.0)
    if prediction == "v":
        return torch.minimum(signal, gamma * noise)
    assert prediction == "x0", f"no min-SNR weight for {prediction}"
    return torch.clamp(signal / noise, max=gamma)
