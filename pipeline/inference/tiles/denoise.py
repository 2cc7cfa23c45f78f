"""Denoising in overlapping windows that are blended at each step (Bar-Tal et al. 2023, MultiDiffusion; Rombach et al.
2021 sample patches so as well).

What is concatenated to a latent is cut with the window: label maps, small images, masks and masked images then say what
belongs there, and a layout's planes of coordinates and painted boxes say where the window lies. Context and vector are
those of the whole picture, in every window. So tasks whose condition is a picture are drawn right, and nothing else
tells windows that are far from each other what the others hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning, ContextCache
from pipeline.inference.tiles.windows import Window, windows
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.task import Task

CONDITIONINGS = 2
"""Conditionings whose windows are kept: with and without guidance."""


@dataclass(frozen=True)
class Chunk:
    """What goes through the network at once: some windows of all rows, or one window of some rows."""

    windows: tuple[Window, ...]
    rows: slice

    def of(self, x_BCHW: Tensor) -> Tensor:
        """The windows one after the other, each with its rows."""
        return torch.cat([window.of(x_BCHW[self.rows]) for window in self.windows])

    def repeated(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor (B, ...) that has no positions, once for each window."""
        return tensor[self.rows].repeat(len(self.windows), *[1] * (tensor.ndim - 1))


@dataclass
class _Cut:
    """A conditioning and what its windows are given, by chunk."""

    whole: Conditioning
    chunks: dict[int, Conditioning] = field(default_factory=dict)
    caches: dict[tuple[int, int], ContextCache] = field(default_factory=dict)
    """Projections of the context, which are the same for all windows."""


class TiledDenoiser(nn.Module):
    """A Denoiser whose latents are denoised in windows of `side`; no longer ones are given to it whole, to the bit.

    side, overlap: of the windows, in positions of the latent, multiples of the UNet's stride. most: rows that go
    through the network at once, at most. Of use where a Denoiser predicts: `task` and `forward` are its own.
    """

    def __init__(self, denoiser: Denoiser, side: int, overlap: int, most: int) -> None:
        super().__init__()
        assert most >= 1
        self.denoiser, self.side, self.overlap, self.most = denoiser, side, overlap, most
        self._cut: deque[_Cut] = deque(maxlen=CONDITIONINGS)

    @property
    def task(self) -> Task:
        return self.denoiser.task

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (B, C, h, w): float32, or as the Denoiser gives it where one window covers the latents."""
        height, width = x_BCHW.shape[-2:]
        if self.side >= max(height, width):
            return self.denoiser(x_BCHW, timestep_B, conditioning)
        cut = self._of(conditioning)
        out = torch.zeros(x_BCHW.shape, dtype=torch.float32, device=x_BCHW.device)
        covering = windows(height, width, self.side, self.overlap, self.denoiser.unet.stride)
        for number, chunk in enumerate(chunks(covering, len(x_BCHW), self.most)):
            if number not in cut.chunks:
                cut.chunks[number] = _given(cut, chunk)
            made = self.denoiser(chunk.of(x_BCHW), chunk.repeated(timestep_B), cut.chunks[number])
            for window, part in zip(chunk.windows, made.chunk(len(chunk.windows)), strict=True):
                window.add(out[chunk.rows], part)
        return out

    def _of(self, conditioning: Conditioning) -> _Cut:
        """What is kept of a conditioning, which stays the same object in all steps of a batch."""
        for cut in self._cut:
            if cut.whole is conditioning:
                return cut
        self._cut.append(_Cut(conditioning))
        return self._cut[-1]


def chunks(covering: list[Window], rows: int, most: int) -> Iterator[Chunk]:
    """All windows of all rows, in chunks of at most `most` rows of the network's batch."""
    if rows <= most:
        together = most // rows
        for first in range(0, len(covering), together):
            yield Chunk(tuple(covering[first : first + together]), slice(0, rows))
        return
    for window in covering:
        for first in range(0, rows, most):
            yield Chunk((window,), slice(first, min(first + most, rows)))


def _given(cut: _Cut, chunk: Chunk) -> Conditioning:
    """The conditioning of a chunk."""
    whole = cut.whole
    cache = None
    if whole.context_cache is not None:
        cache = cut.caches.setdefault((len(chunk.windows), chunk.rows.start), {})
    context, mask, vector = (
        None if tensor is None else chunk.repeated(tensor)
        for tensor in (whole.context, whole.context_mask, whole.vector)
    )
    return Conditioning(context, mask, None if whole.concat is None else chunk.of(whole.concat), vector, cache)
