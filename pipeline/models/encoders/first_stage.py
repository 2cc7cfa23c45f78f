"""The first stage: images to what a cache holds of them and back (Rombach et al. 2021, section 3.1).

A latent is z' = (z - shift) * scale, so that the standard deviation of a channel is near 1. Caches hold what `encode`
gives, which is not scaled; only models/encoders/latents.py scales, and only `decode` undoes it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pipeline.errors import WeightsError
from pipeline.models.first_stage.codebook import nearest
from pipeline.models.kernels.upsampled import FoldedUpsample
from pipeline.models.weights import weights_hash


class FirstStage(ABC):
    """Images and latents. scale, shift: of the latents. downsampling: pixels per latent position along a side.
    latent_channels: C. weights_sha256: hash of its weights, which does not depend on the file that they came from."""

    stored: ClassVar[Literal["moments", "latents", "pixels"]]
    """The array that `encode` gives (data/format/contract.py, Contract.stored)."""
    scale: float
    shift: float
    downsampling: int
    latent_channels: int
    weights_sha256: str
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def float32(self) -> FirstStage:
        """The stage with the same weights in float32 on the same device; a float32 stage returns itself."""

    @abstractmethod
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what a cache holds of them, on the stage's device.

        moments (B, 2C, h, w), posterior mean and log-variance, or latents (B, C, h, w) before any quantisation:
        float32, unscaled. pixels (B, 3, H, W): uint8.
        """

    @abstractmethod
    def mean(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> unscaled latents (B, C, h, w) float32; of a posterior its mean, of pixels
        the images themselves."""

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, h f, w f), float32, clamped to [-1, 1]."""
        return self.decode_with_gradient(z_BCHW).clamp(-1, 1)

    @abstractmethod
    def decode_with_gradient(self, z_BCHW: Tensor) -> Tensor:
        """The same, not clamped, and differentiable in the latents where gradients are on; those of quantised latents
        pass to the latents as they are (straight-through; van den Oord et al. 2017, section 3.2)."""


class NetworkStage(FirstStage):
    """A first stage that is a network of diffusers, `model`, whose class has the name `architecture`."""

    architecture: ClassVar[str]

    def __init__(
        self, model: Any, dtype: torch.dtype, device: torch.device, reload: Callable[[], FirstStage] | None = None
    ) -> None:
        """model: in float32; the stage takes it over and changes it. reload: loads the stage again in float32."""
        config = model.config
        self.scale = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = int(config.latent_channels)
        self.weights_sha256 = weights_hash(model.state_dict().items())
        self.device, self.dtype = device, dtype
        self._reload = reload
        self._float32: FirstStage | None = None
        # Module.to directly: diffusers' override warns about a cast that concerns no layer of this class.
        self.model = torch.nn.Module.to(model, device=device, dtype=dtype).eval().requires_grad_(False)
        for block in self.model.decoder.up_blocks:
            for i, up in enumerate(getattr(block, "upsamplers", None) or ()):
                block.upsamplers[i] = FoldedUpsample(up.conv)

    def float32(self) -> FirstStage:
        """As above. A cast loses bits, so the first call loads the weights again. Raises WeightsError when they have
        changed or can no longer be loaded."""
        if self.dtype == torch.float32:
            return self
        if self._float32 is None:
            assert self._reload is not None, "this stage was made without a way to load it again"
            loaded = self._reload()
            if loaded.weights_sha256 != self.weights_sha256:
                raise WeightsError("the autoencoder's weights have changed since they were first loaded: start again")
            self._float32 = loaded
        return self._float32

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        # Channels last makes convolutions on a CPU up to twice as fast.
        x = x_BCHW.to(self.device, self.dtype, memory_format=torch.channels_last)
        h = self.model.encoder(x)
        return (h if self.model.quant_conv is None else self.model.quant_conv(h)).float().contiguous()

    def mean(self, x_BCHW: Tensor) -> Tensor:
        return self.encode(x_BCHW)[:, : self.latent_channels]

    def network_input(self, z_BCHW: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> what the decoder's first layer is given, in the stage's precision."""
        # Channels last is faster, as above.
        return self._unscaled(z_BCHW).to(self.dtype, memory_format=torch.channels_last)

    def _unscaled(self, z_BCHW: Tensor) -> Tensor:
        """z of scaled latents, float32."""
        return z_BCHW.to(self.device).float() / self.scale + self.shift


class KLStage(NetworkStage):
    """diffusers' AutoencoderKL: the posterior is N(mean, exp(logvar))."""

    stored = "moments"
    architecture = "AutoencoderKL"

    def decode_with_gradient(self, z_BCHW: Tensor) -> Tensor:
        return self.model.decode(self.network_input(z_BCHW)).sample.float()


class VQStage(NetworkStage):
    """diffusers' VQModel: latents are those before quantisation, and `decode` quantises (Rombach et al. 2021, section
    3.1: the quantisation layer belongs to the decoder). Distances are in float32 whatever the networks' precision."""

    stored = "latents"
    architecture = "VQModel"

    def __init__(
        self, model: Any, dtype: torch.dtype, device: torch.device, reload: Callable[[], FirstStage] | None = None
    ) -> None:
        codebook = model.quantize.embedding.weight.detach().clone()
        super().__init__(model, dtype, device, reload)
        self.latent_channels = codebook.shape[1]
        self.codebook = codebook.to(device)
        """Entries of the codebook (n, C), float32."""

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> number of the nearest entry at every position, (B, h, w) int64; what
        training chooses for the same latents and codes."""
        return nearest(z_BCHW.to(self.device).permute(0, 2, 3, 1), self.codebook)

    def quantise(self, z_BCHW: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> the nearest entry of the codebook at every position, float32."""
        return self.codebook[self.nearest(z_BCHW)].permute(0, 3, 1, 2)

    def network_input(self, z_BCHW: Tensor) -> Tensor:
        unscaled = self._unscaled(z_BCHW)
        z = self.quantise(unscaled.detach())
        if unscaled.requires_grad:
            z = z + (unscaled - unscaled.detach())  # 0, whose gradient is 1
        return z.to(self.dtype, memory_format=torch.channels_last)

    def decode_with_gradient(self, z_BCHW: Tensor) -> Tensor:
        z = self.network_input(z_BCHW)
        h = self.model.post_quant_conv(z)
        spatial = self.model.config.norm_type == "spatial"
        return self.model.decoder(h, z if spatial else None).float()


class Identity(FirstStage):
    """No first stage: a latent is the pixels, from -1 to 1, three channels at every pixel (f = 1)."""

    stored = "pixels"
    scale, shift, downsampling, latent_channels = 1.0, 0.0, 1, 3
    weights_sha256 = hashlib.sha256(b"identity").hexdigest()
    dtype = torch.float32

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def float32(self) -> FirstStage:
        return self

    def encode(self, x_BCHW: Tensor) -> Tensor:
        return ((x_BCHW.to(self.device).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def mean(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.to(self.device).float()

    def decode_with_gradient(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW.to(self.device).float()


NETWORKS: dict[str, type[NetworkStage]] = {stage.architecture: stage for stage in (KLStage, VQStage)}
"""Class of diffusers -> the stage that it becomes."""
