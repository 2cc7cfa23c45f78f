"""What a GPU computes: its peak by precision, and the share of it that training is assumed to reach. Imports no
torch."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.planning.plan import machines
from pipeline.planning.plan.machines import Gpu

EFFICIENCY = {True: 0.40, False: 0.35}
"""Share of the 16-bit peak that model FLOPs are assumed to reach in training, by whether blocks are compiled: an H200
reached 0.41 and 0.35 at SD2, 512 pixels, batch 64 (benchmarks/results/unet-profile-nvidia-h200.md). Smaller networks,
images and batches reach less."""
FP32_TFLOPS = {
    "b200": 75.0,
    "h200": 66.9,
    "h100 pcie": 51.2,
    "h100": 66.9,
    "a100": 19.5,
    "l40s": 91.6,
    "a10g": 35.0,
    "v100": 15.7,
}
"""Peaks of float32 products without TF32 in TFLOP/s, from the makers' data sheets, by names of the table of GPUs."""


def gpu_of(name: str) -> Gpu:
    """The GPU that a name means, as Slurm, PyTorch or people write it. Raises ConfigError for one that is not known."""
    if found := machines.gpu_of(name):
        return found
    raise ConfigError(f"gpu={name}: no such GPU is known; there are {machines.names()}")


def peak_flops(gpu: Gpu, precision: str) -> float:
    """FLOP/s of products at best. precision: bf16 or fp32."""
    return 1e12 * (gpu.peak_tflops if precision == "bf16" else FP32_TFLOPS[gpu.name])
