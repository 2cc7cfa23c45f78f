"""A first stage that decodes and encodes large pictures in overlapping tiles.

Tiles change three things of an autoencoder. A convolution at a tile's border sees zeros where the picture goes on; the
middle block's attention sees the tile alone; and norms take mean and deviation of the tile. The middle block works at
the latent's size, where a picture is small, so it is given the whole picture, and the layers that need the memory get
tiles. These go through the tiles twice: first to gather the moments of every norm's input over the whole picture, then
with them (each norm's are exact but for what earlier norms, which had the tile's own, changed in the first pass).
`python -m benchmarks.tiles` measures what each of this gains.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.inference.tiles.field import decoder_reach, encoder_reach
from pipeline.inference.tiles.norms import WholeStatistics
from pipeline.inference.tiles.windows import Window, windows
from pipeline.models.encoders.first_stage import FirstStage, NetworkStage

TOGETHER = 64 * 64
"""Latent positions that go through a network at once, where one tile has fewer."""


@dataclass(frozen=True)
class Way:
    """How a picture is cut. middle: which part of it the middle block sees. norms: of which part the decoder's later
    norms take mean and deviation; for those of the whole picture it is decoded twice."""

    middle: Literal["tile", "whole"] = "whole"
    norms: Literal["tile", "whole"] = "whole"


class TiledStage(FirstStage):
    """`stage`, whose pictures are cut where a side is longer than `side`; others are its own, to the bit.

    side: of a tile, in latent positions. overlap: positions that neighbouring tiles share and are blended over; None =
    as many as `overlap_of` says. at_once: latent positions of whole pictures that go through the network at once; 0 =
    all of a batch. Tiles go one by one, small ones of several pictures together, and are summed in float32, on the CPU
    where a picture does not fit the device.
    """

    def __init__(
        self,
        stage: NetworkStage,
        side: int,
        overlap: int | None = None,
        *,
        at_once: int = 0,
        way: Way = Way(),
    ) -> None:
        self.stage, self.side, self.way, self.at_once = stage, side, way, at_once
        self.stored = stage.stored  # type: ignore[misc]  # of the class in other stages
        self.scale, self.shift, self.downsampling = stage.scale, stage.shift, stage.downsampling
        self.latent_channels, self.weights_sha256 = stage.latent_channels, stage.weights_sha256
        self.device, self.dtype = stage.device, stage.dtype
        self.overlap = overlap_of(stage.model, side) if overlap is None else overlap
        self._norms: WholeStatistics | None = None
        if way.norms == "whole":
            self._norms = WholeStatistics(stage.model.decoder)

    def float32(self) -> FirstStage:
        stage = self.stage.float32()
        if stage is self.stage:
            return self
        assert isinstance(stage, NetworkStage)
        return TiledStage(stage, self.side, self.overlap, at_once=self.at_once, way=self.way)

    # ----------------------------------------------------------------------------------------------------------------
    # Decoding

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        height, width = z_BCHW.shape[2:]
        if max(height, width) <= self.side:
            parts = [self.stage.decode(part) for part in z_BCHW.split(self._images(height, width, len(z_BCHW)))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        factor = self.downsampling
        out = self._empty(len(z_BCHW), 3, height * factor, width * factor)
        tile = min(self.side, height) * min(self.side, width)
        images = max(1, max(TOGETHER, self.at_once) // tile)
        for first in range(0, len(z_BCHW), images):
            part = self.stage.network_input(z_BCHW[first : first + images])
            self._decode(part, out[first : first + images])
        return out.clamp_(-1, 1)

    def decode_with_gradient(self, z_BCHW: Tensor) -> Tensor:
        """Of whole pictures: what needs gradients of large ones is refused with tiles."""
        return self.stage.decode_with_gradient(z_BCHW)

    def _decode(self, z: Tensor, out: Tensor) -> None:
        """Add the pictures of what the decoder is given, (B, C, h, w), to zeros (B, 3, H, W)."""
        height, width = z.shape[2:]
        covering = windows(height, width, self.side, self.overlap)
        factor = self.downsampling
        sides = (height * factor, width * factor)
        in_pixels = windows(*sides, self.side * factor, self.overlap * factor, factor)  # with finer ramps
        whole = self._until_middle(z) if self.way.middle == "whole" else None

        def tile(window: Window) -> Tensor:
            before = self._until_middle(_laid_out(window.of(z))) if whole is None else _laid_out(window.of(whole))
            return self._after_middle(before, _laid_out(window.of(z)))

        if self._norms is not None:
            self._gather(self._norms, covering, tile)
        with self._norms.applied() if self._norms is not None else nullcontext():
            for window, pixels in zip(covering, in_pixels, strict=True):
                pixels.add(out, tile(window))

    def _gather(self, norms: WholeStatistics, covering: list[Window], tile: Callable[[Window], Tensor]) -> None:
        """Gather the statistics of whole pictures."""
        for window in covering:
            with norms.gathered_from(window):
                tile(window)

    def _until_middle(self, z: Tensor) -> Tensor:
        model = self.stage.model
        h = z if model.post_quant_conv is None else model.post_quant_conv(z)
        return model.decoder.mid_block(model.decoder.conv_in(h), self._embeds(z))

    def _after_middle(self, h: Tensor, z: Tensor) -> Tensor:
        decoder, embeds = self.stage.model.decoder, self._embeds(z)
        for block in decoder.up_blocks:
            h = block(h, embeds)
        h = decoder.conv_norm_out(h) if embeds is None else decoder.conv_norm_out(h, embeds)
        return decoder.conv_out(decoder.conv_act(h))

    def _embeds(self, z: Tensor) -> Tensor | None:
        """What norms of some VQModels read beside their input."""
        return z if getattr(self.stage.model.config, "norm_type", "group") == "spatial" else None

    # ----------------------------------------------------------------------------------------------------------------
    # Encoding

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        factor = self.downsampling
        height, width = x_BCHW.shape[2] // factor, x_BCHW.shape[3] // factor
        if max(height, width) <= self.side:
            parts = [self.stage.encode(part) for part in x_BCHW.split(self._images(height, width, len(x_BCHW)))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat([self._encode(picture, height, width) for picture in x_BCHW.split(1)])

    def _encode(self, x: Tensor, height: int, width: int) -> Tensor:
        """What a cache holds of pictures (B, 3, H, W) of height x width latent positions."""
        model, whole = self.stage.model, self.way.middle == "whole"
        out: Tensor | None = None
        for window in windows(height, width, self.side, self.overlap):
            top, left, bottom, right = window.times(self.downsampling)
            h = model.encoder.conv_in(_laid_out(x[:, :, top:bottom, left:right].to(self.device, self.dtype)))
            for block in model.encoder.down_blocks:
                h = block(h)
            h = h if whole else self._from_middle(h)
            if out is None:
                out = torch.zeros((*h.shape[:2], height, width), dtype=torch.float32, device=h.device)
            window.add(out, h)
        assert out is not None
        return self._from_middle(_laid_out(out.to(self.dtype))).float().contiguous() if whole else out

    def _from_middle(self, h: Tensor) -> Tensor:
        encoder, last = self.stage.model.encoder, self.stage.model.quant_conv
        h = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(h))))
        return h if last is None else last(h)

    def mean(self, x_BCHW: Tensor) -> Tensor:
        return self.encode(x_BCHW)[:, : self.latent_channels]

    # ----------------------------------------------------------------------------------------------------------------

    def _images(self, height: int, width: int, batch: int) -> int:
        """Whole pictures that go through the network at once."""
        return max(1, self.at_once // (height * width)) if self.at_once else batch

    def _empty(self, *shape: int) -> Tensor:
        """Zeros, float32, on the device, or on the CPU where the device has no room for them twice."""
        device = self.device
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 8 * torch.Size(shape).numel():
            device = torch.device("cpu")
        return torch.zeros(shape, dtype=torch.float32, device=device)


def overlap_of(model: Any, side: int) -> int:
    """Latent positions that tiles of `side` share: more than an output position sees to both sides, half of a tile at
    most."""
    reaches = [decoder_reach(model, middle=False)]
    if (pixels := encoder_reach(model)) is not None:
        reaches.append(-(-pixels // 2 ** (len(model.config.block_out_channels) - 1)))
    widest = max((2 * reach + 1 for reach in reaches if reach is not None), default=side)
    return min(widest + 1, side // 2)


def _laid_out(x: Tensor) -> Tensor:
    """A part of a picture in the layout that is fastest (models/encoders/first_stage.py)."""
    return x.contiguous(memory_format=torch.channels_last)
