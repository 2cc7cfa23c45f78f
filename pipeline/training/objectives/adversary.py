"""When the discriminator is trained, when the autoencoder feels it, and how strongly (Esser et al. 2021, equation 7).

Everything is counted in samples, whatever the batch is and however many parts step: a loss that begins by optimizer
steps begins at half of them where a framework counts those of both networks.

The optimizer counts its steps from the run's first batch for both parts. A discriminator that begins later so has
moments of 0 and the bias correction of all steps at its first one, (1 - beta1) / sqrt(1 - beta2) learning rates long
after many: what the paper's code does, whose second optimizer steps from the first batch with a loss of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import GanConfig
from pipeline.distributed.world import World

SMALL = 1e-4
"""Added to the norm of the generator's gradient, as the paper's code has it."""
MOST = 1e4
"""The largest ratio of gradients."""


@dataclass(frozen=True)
class Phase:
    """What a step does with the discriminator. trains: whether it is trained. weight: of the generator's loss, to be
    multiplied by the ratio of gradients; 0 = the autoencoder does not feel it."""

    trains: bool = False
    weight: float = 0.0


def phase_at(gan: GanConfig, n: int) -> Phase:
    """The phase of the step that begins at n samples seen."""
    if gan.weight == 0 or n < gan.after - gan.warmup:
        return Phase()
    if n < gan.after:
        return Phase(trains=True)
    risen = 1.0 if gan.ramp == 0 else min(1.0, (n - gan.after) / gan.ramp)
    return Phase(trains=True, weight=gan.weight * risen)


def adversarial_gradient(
    reconstruction: Tensor,
    last_layer: Tensor,
    *,
    likelihood: Tensor,
    generator: Tensor,
    weight: float,
    world: World,
) -> tuple[Tensor, Tensor]:
    """The gradient of likelihood + weight x ratio x generator by the reconstruction, and weight x ratio, a scalar.

        ratio = |gradient of likelihood| / (|gradient of generator| + SMALL), both by the last layer's weights, <= MOST

    reconstruction (b, 3, H, W), whose graph is kept; likelihood, generator: scalars, means over this rank's pictures.
    The norms are of the mean gradients of all ranks' pictures, so that the ratio does not depend on how many ranks
    share them. Both losses are walked through once: the rest of the backward pass begins at the reconstruction.
    Collective.
    """
    (of_likelihood,) = torch.autograd.grad(likelihood, reconstruction)
    (of_generator,) = torch.autograd.grad(generator, reconstruction)
    by_layer = [
        torch.autograd.grad(reconstruction, last_layer, gradient, retain_graph=True)[0].float().flatten()
        for gradient in (of_likelihood, of_generator)
    ]
    first, second = world.added(torch.stack(by_layer)).div(world.size).double().norm(dim=1)
    strength = weight * (first / (second + SMALL)).clamp(0, MOST).float()
    return of_likelihood + strength * of_generator, strength
