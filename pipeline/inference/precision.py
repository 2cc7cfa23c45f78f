"""In which precision pictures are drawn: the dtype in which the network predicts, and whether float32 products may be
rounded to TF32.

TF32 is what NVIDIA's tensor cores make of float32 (Ampere and later): factors with 10 bits of mantissa, sums in
float32. PyTorch rounds convolutions so unless it is told otherwise. Here nothing is, unless a verb's tf32=true names
it: what measures images always gets float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.models.encoders.first_stage import FirstStage

BF16 = "bf16"
"""The word for bfloat16 in keys and on cards."""


@dataclass(frozen=True)
class Precision:
    """dtype: of the denoiser's weights and activations, torch.float32 or torch.bfloat16; samplers compute in float32.
    tf32: whether float32 products of denoiser, decoder and guides may be rounded to TF32."""

    dtype: torch.dtype = torch.float32
    tf32: bool = False

    def facts(self, first_stage: FirstStage) -> dict[str, Any]:
        """What is not plain float32, for cards: {"denoiser": "bf16", "decoder": "bf16", "tf32": True}. The decoder's
        dtype is that of encoders.vae_dtype."""
        halves = {"denoiser": self.dtype, "decoder": first_stage.dtype}
        facts: dict[str, Any] = {name: BF16 for name, dtype in halves.items() if dtype == torch.bfloat16}
        return facts | ({"tf32": True} if self.tf32 else {})


FP32 = Precision()


def precision_of(name: str, tf32: bool, device: torch.device) -> Precision:
    """The precision of auto, fp32 or bf16 on a device; auto is bf16 on GPUs that have it, else fp32. CPUs have no
    TF32."""
    on_gpu = device.type == "cuda"
    bf16 = name == BF16 or (name == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False))
    return Precision(torch.bfloat16 if bf16 else torch.float32, tf32 and on_gpu)


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Inside, matrix products and convolutions of float32 tensors on GPUs may be rounded to TF32, or may not be. What
    was set before is set again afterwards."""
    settings = _settings(tf32)
    before = [getattr(where, name) for where, name, _ in settings]
    try:
        for where, name, value in settings:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(settings, before, strict=True):
            setattr(where, name, value)


def _settings(tf32: bool) -> list[tuple[Any, str, Any]]:
    """Object, attribute and value of PyTorch's settings: since 2.9 by operation, before by library."""
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        word = "tf32" if tf32 else "ieee"
        return [(where, "fp32_precision", word) for where in (torch.backends.cuda.matmul, cudnn.conv)]
    return [(where, "allow_tf32", tf32) for where in (torch.backends.cuda.matmul, cudnn)]
