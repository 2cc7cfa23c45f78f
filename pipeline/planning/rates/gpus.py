"""What makers say of their GPUs: peak rates, memory, bandwidth. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import ConfigError

EFFICIENCY = {True: 0.40, False: 0.35}
"""Share of the 16-bit peak that model FLOPs are assumed to reach in training, by whether blocks are compiled: an H200
reached 0.41 and 0.35 at SD2, 512 pixels, batch 64 (benchmarks/results/unet-profile-nvidia-h200.md). Smaller networks,
images and batches reach less."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its maker's data sheet.

    name: a part of the name that PyTorch gives the device. tflops: dense 16-bit peak of tensor cores, in TFLOP/s.
    fp32_tflops: peak for float32 products as PyTorch makes them, without TF32. memory_gb: in GB (1e9 bytes). tb_s:
    bandwidth of its memory in TB/s.
    """

    name: str
    tflops: float
    fp32_tflops: float
    memory_gb: float
    tb_s: float

    def peak(self, precision: str) -> float:
        """FLOP/s of products in a precision: bf16 or fp32."""
        return 1e12 * (self.tflops if precision == "bf16" else self.fp32_tflops)


GPUS = (
    Gpu("B200", 2250.0, 75.0, 192.0, 8.0),
    Gpu("H200", 989.4, 66.9, 141.0, 4.8),
    Gpu("H100 PCIe", 756.0, 51.2, 80.0, 2.0),
    Gpu("H100", 989.4, 66.9, 80.0, 3.35),
    Gpu("A100", 312.0, 19.5, 80.0, 2.0),
    Gpu("L40S", 362.0, 91.6, 48.0, 0.864),
    Gpu("A10G", 125.0, 31.2, 24.0, 0.6),
    Gpu("V100", 125.0, 15.7, 32.0, 0.9),
)
"""The GPUs that are known. A name that has another's within it comes first. An A100 with 40 GB has less memory and
bandwidth than the one here."""


def gpu_of(name: str) -> Gpu:
    """The GPU that a name means: h200, "NVIDIA H200", a100-80gb. Raises ConfigError for one that is not known."""
    if found := known(name):
        return found
    names = ", ".join(_plain(gpu.name) for gpu in GPUS)
    raise ConfigError(f"gpu={name}: no such GPU is known; there are {names}, and cpu")


def known(name: str) -> Gpu | None:
    """The GPU that a name means, as Slurm, PyTorch or people write it; None where none is known."""
    plain = _plain(name)
    words = {plain, *re.split(r"[^a-z0-9]+", name.lower())}
    for gpu in GPUS:
        own = _plain(gpu.name)
        if own in words or (" " in gpu.name and own in plain) or plain.startswith(own) or own in plain.split("nvidia"):
            return gpu
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
