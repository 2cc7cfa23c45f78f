"""What samplers are given besides a model: an image to begin from, a region to keep, and a score to follow.

All three act on the predicted x_0 or on the first x, never on a step, so they are the same for every sampler and
process, and exact for those of second order, which step from x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.errors import ConfigError, RunError

Predict = Callable[[Tensor, Level], Tensor]
"""(x, level) -> predicted x_0, both (B, C, h, w)."""

LEAST_ALPHA = 0.05
"""Smallest alpha that a gradient is divided by. Where alpha is 0 x is pure noise, says nothing of x_0, and is not
steered."""


@dataclass(frozen=True)
class Start:
    """Begin from an image instead of from noise (Meng et al. 2021, SDEdit).

    latents_BCHW: of the images, scaled as in training. strength: in (0, 1], the share of the denoising steps that are
    taken. Noise is added up to the level where they begin; at 1 that is the first level of all, where some of the image
    may be left.
    """

    latents_BCHW: Tensor
    strength: float

    def levels(self, levels: Sequence[Level]) -> list[Level]:
        """The last levels of a whole walk: those that strength leaves, as diffusers counts them. Raises ConfigError
        where no step is left."""
        steps = len(levels) - 1
        taken = min(int(steps * self.strength), steps)
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength={self.strength:g}: more than 0 and at most 1 is wanted")
        if taken == 0:
            raise ConfigError(
                f"strength={self.strength:g} of {steps} denoising steps is no step: give more steps, or a strength of "
                f"at least {math.ceil(1000 / steps) / 1000:g}"
            )
        return list(levels[steps - taken :])

    def x(self, level: Level, noise_BCHW: Tensor) -> Tensor:
        """x at the level where sampling begins."""
        return level.alpha * self.latents_BCHW + level.sigma * noise_BCHW


@dataclass(frozen=True)
class Keep:
    """Keep a region as it is in an image (Lugmayr et al. 2022, algorithm 1, without resampling): where `new_B1HW` is 0
    the predicted x_0 is the image's, in the last step as well.

    latents_BCHW: of the image, scaled as in training. new_B1HW: float, 1 where the image is made anew, 0 where it is
    kept, and between them for a mixture.
    """

    latents_BCHW: Tensor
    new_B1HW: Tensor

    def __call__(self, x0: Tensor) -> Tensor:
        return torch.where(self.new_B1HW == 0, self.latents_BCHW, torch.lerp(self.latents_BCHW, x0, self.new_B1HW))


Score = Callable[[Tensor, Tensor, Level], Tensor]
"""(x_0, x, level) -> (B,), the log-likelihood of what is wanted, one number for each image. x is of variance 1 in the
discrete process, as in training; the level's alpha and sigma are of that x."""


@dataclass(frozen=True)
class Steer:
    """Follow the gradient of a score while sampling (Dhariwal & Nichol 2021, section 4; Rombach et al. 2021, appendix
    C): x_0 + weight (sigma^2 / alpha) grad_x score, which is their epsilon - weight sigma grad_x score. The sign that
    Rombach et al. print in appendix C leads away from what is wanted.

    score: its images do not depend on one another, or the result would depend on the batch. name: for messages.
    through_network: whether the score reads x_0, so that its gradient goes through the network; if not, the network
    is evaluated without a graph.
    """

    score: Score
    weight: float
    name: str = "guide"
    through_network: bool = True


def steered(predict: Predict, steers: Sequence[Steer]) -> Predict:
    """`predict` with its x_0 moved by the gradients of all scores. Without any, and in pure noise, `predict` itself.

    Raises RunError for a gradient that does not exist, is not finite, or is zero everywhere: what is sampled then would
    be a picture that was not guided.
    """
    if not steers:
        return predict

    def moved(x: Tensor, level: Level) -> Tensor:
        if level.alpha == 0:
            return predict(x, level)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            reads_x0 = any(steer.through_network for steer in steers)
            with torch.set_grad_enabled(reads_x0):
                x0 = predict(x, level)
            change = torch.zeros_like(x)
            for i, steer in enumerate(steers):
                read = x0 if steer.through_network else x0.detach()
                gradient = _gradient(steer, steer.score(read, x, level), x, retain=i + 1 < len(steers))
                change += steer.weight * gradient
        return x0.detach() + level.sigma**2 / max(level.alpha, LEAST_ALPHA) * change

    return moved


def _gradient(steer: Steer, score_B: Tensor, x: Tensor, retain: bool) -> Tensor:
    """d score / d x of each image."""
    assert score_B.shape == x.shape[:1], f"{steer.name}: a score has one number for each image"
    if not score_B.requires_grad:
        raise RunError(
            f"guide {steer.name}: its score has no gradient by the image, so nothing would be guided: weights that are "
            "packed for prediction, or a network that runs without gradients, lie in between"
        )
    (gradient,) = torch.autograd.grad(score_B.sum(), x, retain_graph=retain, allow_unused=True)
    if gradient is None or not gradient.any():
        raise RunError(f"guide {steer.name}: the gradient of its score is zero everywhere, so nothing would be guided")
    if not gradient.isfinite().all():
        raise RunError(
            f"guide {steer.name}: the gradient of its score is not finite: the weight {steer.weight:g} may be too large"
        )
    return gradient


@dataclass(frozen=True)
class Hooks:
    """All that a batch of images is given besides its conditioning."""

    start: Start | None = None
    keep: Keep | None = None
    steer: tuple[Steer, ...] = ()

    def __or__(self, other: Hooks) -> Hooks:
        """Both. At most one of them has a start, and one a region to keep."""
        assert self.start is None or other.start is None, "two images to begin from"
        assert self.keep is None or other.keep is None, "two regions to keep"
        return Hooks(self.start or other.start, self.keep or other.keep, self.steer + other.steer)


NO_HOOKS = Hooks()
