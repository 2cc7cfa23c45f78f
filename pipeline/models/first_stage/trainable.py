"""Autoencoder and discriminator in one module: the module that is trained, averaged and saved.

One backward pass of L_AE + L_D gives each of the two the gradient that it would have from an optimizer and a backward
pass of its own: the autoencoder's loss goes through detached weights of the discriminator, and the discriminator's
through detached reconstructions (tests compare the two, to the bit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.config import FirstStageConfig, GanConfig
from pipeline.errors import ShapeError
from pipeline.models.first_stage import architecture
from pipeline.models.first_stage.codebook import Quantised, quantise
from pipeline.models.first_stage.discriminator import PatchDiscriminator

PARTS: dict[str, tuple[str, ...]] = {"autoencoder": ("model.", "extra."), "discriminator": ("discriminator.",)}
"""Parts whose gradients have a norm of their own, with the beginnings of their parameters' names."""
AVERAGED = ("model.",)
"""Beginnings of the names of the parameters that are averaged (EMA) and exported."""
LOGVAR = (-30.0, 20.0)
"""Bounds of the posterior's log-variance, which diffusers' AutoencoderKL has too."""


@dataclass(frozen=True)
class Outputs:
    """What the losses of a batch are computed from. All numbers are float32."""

    reconstruction: Tensor
    """(B, 3, H, W), in [-1, 1] or a little beyond."""
    z: Tensor
    """(B, C, h, w): what the decoder was given, before post_quant_conv."""
    moments: Tensor | None = None
    """kl: (B, 2C, h, w): the posterior's mean, and its log-variance within LOGVAR."""
    kl_B: Tensor | None = None
    """kl: (B,): divergence of an image's posterior from the standard normal, in nats, summed over the latent."""
    quantised: Quantised | None = None
    """vq: codes and their losses."""
    logits_for_generator: Tensor | None = None
    """(B, 1, H', W'): of the reconstruction, without gradients for the discriminator."""
    logits_real: Tensor | None = None
    """(B, 1, H', W'): of the pictures, for the discriminator's loss."""
    logits_fake: Tensor | None = None
    """(B, 1, H', W'): of the reconstruction, without gradients for the autoencoder."""


class TrainableAutoencoder(nn.Module):
    """The autoencoder of `config`, a discriminator if gan.weight > 0, and a module of further losses or None.

    model: diffusers' AutoencoderKL or VQModel. extra: layers of losses that are not of the paper; it is trained beside
    the autoencoder, and neither averaged nor exported. latent_noise: standard deviation of noise beyond the posterior's
    that the decoder learns to tolerate (kl).
    """

    PARTS: Mapping[str, tuple[str, ...]]
    """Those of PARTS that there are."""
    AVERAGED: ClassVar[tuple[str, ...]] = AVERAGED
    ADAM_ONLY = (
        *("model.encoder.conv_in", "model.encoder.conv_out", "model.decoder.conv_in", "model.decoder.conv_out"),
        *("model.quant_conv", "model.post_quant_conv", "model.quantize", "discriminator", "extra"),
    )
    """Modules that Muon does not update (training/engines/optimizer.py): those at either end of a network, the codebook
    and the discriminator, whose step is the one that the paper's learning rates are for."""

    def __init__(
        self,
        config: FirstStageConfig,
        gan: GanConfig | None = None,
        extra: nn.Module | None = None,
        latent_noise: float = 0.0,
    ) -> None:
        super().__init__()
        assert latent_noise == 0 or config.regularizer == "kl", "codes have no noise"
        self.config, self.latent_noise = config, latent_noise
        self.model = architecture.build(config)
        self.discriminator: PatchDiscriminator | None = None
        if gan is not None and gan.weight > 0:
            self.discriminator = PatchDiscriminator(gan.channels, gan.layers, config.norm_groups)
        self.extra = extra
        self.PARTS = {part: PARTS[part] for part in PARTS if part != "discriminator" or self.discriminator is not None}

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients are compared for the discriminator's weight (Esser et al. 2021, equation 7)."""
        weight: Tensor = self.model.decoder.conv_out.weight
        return weight

    @property
    def codebook(self) -> Tensor:
        """vq: the codebook (n, C)."""
        weight: Tensor = self.model.quantize.embedding.weight
        return weight

    def forward(
        self, x_B3HW: Tensor, noise_BChw: Tensor | None, gan: bool = False, train_discriminator: bool = False
    ) -> Outputs:
        """Reconstruct pictures (B, 3, H, W) in [-1, 1], whose sides are multiples of f.

        noise: (B, C, h, w) standard normals that the posterior is drawn with; None = its mean (vq has none). gan:
        whether to judge the reconstruction for the autoencoder's loss. train_discriminator: whether to judge pictures
        and reconstructions for the discriminator's; if not, its parameters have gradients of exactly 0, with which the
        optimizer steps (training/objectives/adversary.py). Raises ShapeError.
        """
        self._check(x_B3HW)
        x = self._laid_out(x_B3HW)
        h = self.model.quant_conv(self.model.encoder(x)).float()
        moments = kl_B = quantised = None
        if self.config.regularizer == "kl":
            assert noise_BChw is None or noise_BChw.shape[1] == self.config.latent_channels
            mean, logvar = h.chunk(2, dim=1)
            logvar = logvar.clamp(*LOGVAR)
            variance = logvar.exp()
            moments = torch.cat([mean, logvar], dim=1)
            kl_B = 0.5 * (mean.square() + variance - 1 - logvar).sum(dim=(1, 2, 3))
            z = mean if noise_BChw is None else mean + self._spread(logvar, variance) * noise_BChw.float()
        else:
            quantised = quantise(h, self.codebook)
            z = quantised.z_q
        y = self.model.decoder(self.model.post_quant_conv(z.to(x.dtype))).float()
        if self.discriminator is None:
            assert not gan and not train_discriminator, "there is no discriminator"
            return Outputs(y, z, moments, kl_B, quantised)
        for_generator = real = fake = None
        if gan:
            for_generator = self.judge(y)
        if train_discriminator:
            pairs = torch.cat([x, y.detach().to(x.dtype)])
            real, fake = self.discriminator(pairs).float().chunk(2)
        else:
            y = _ZeroGradients.apply(y, *self.discriminator.parameters())
        return Outputs(y, z, moments, kl_B, quantised, for_generator, real, fake)

    def judge(self, y_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, H', W') float32 of pictures by the discriminator, whose weights have no gradient from them."""
        assert self.discriminator is not None
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits: Tensor = functional_call(self.discriminator, weights, (self._laid_out(y_B3HW),))
        return logits.float()

    def reset_parameters(self, seed: int) -> None:
        """Initialize all parts; one seed gives the same weights on every machine."""
        architecture.reset_parameters(self.model, seed)
        parts: tuple[Any, ...] = (self.discriminator, self.extra)
        for part in parts:
            if hasattr(part, "reset_parameters"):
                part.reset_parameters(seed)

    def _spread(self, logvar: Tensor, variance: Tensor) -> Tensor:
        """Standard deviation of what is added to the mean."""
        if not self.latent_noise:
            return (0.5 * logvar).exp()
        return (variance + self.latent_noise**2).sqrt()

    def _laid_out(self, x: Tensor) -> Tensor:
        """Pictures in the dtype of the weights, and in the layout in which convolutions are fastest."""
        x = x.to(self.last_layer.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x

    def _check(self, x: Tensor) -> None:
        """Raise ShapeError for pictures that the autoencoder cannot take."""
        f = self.config.downsampling
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ShapeError(
                f"the autoencoder takes pictures (B, 3, H, W) whose sides are multiples of {f} (autoencoder.multipliers"
                f" has {len(self.config.multipliers)} levels), not {tuple(x.shape)}"
            )


class _ZeroGradients(torch.autograd.Function):
    """The first tensor as it is; the gradients of the others are 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
        return (grads[0], *(zero if need else None for zero, need in zip(zeros, ctx.needs_input_grad[1:])))
