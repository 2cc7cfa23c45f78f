"""The committed measurements that rates come from where nobody has calibrated (benchmarks/results/). Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pipeline.config import ModelConfig
from pipeline.planning.cost import unet_cost
from pipeline.planning.memory import Precision, kept_bytes
from pipeline.planning.parts import Cost, Kind

SD2 = ModelConfig(
    name="sd2",
    channels=320,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    attention=(1, 2, 4),
    heads=0,
    head_width=64,
    context_width=1024,
    linear_projection=True,
)
"""conf/model/sd2.yaml."""
IMAGES, SIDE, TOKENS = 64, 64, 77
"""Micro-batch, side of the latents and tokens of the profiled step."""


@dataclass(frozen=True)
class Profile:
    """Where the milliseconds of a measured training step of SD2 at 512 pixels went, by kind of operation. optimizer:
    with clipping; other: what lies between layers."""

    gpu: str
    precision: Precision
    compile: bool
    images_per_s: float
    milliseconds: dict[Kind, float]
    optimizer: float
    other: float
    where: str


H200 = "NVIDIA H200, SD2 at 512 pixels, batch 64, 2026-11-26 (benchmarks/results/unet-profile-nvidia-h200.md)"
PROFILES = (
    Profile("h200", "bf16", True, 167.6, {"conv": 116.21, "linear": 80.47, "attention": 70.22}, 10.14, 95.83, H200),
    Profile("h200", "bf16", False, 144.3, {"conv": 110.83, "linear": 78.62, "attention": 66.42}, 12.03, 171.65, H200),
)
"""Sums of a row are the step's milliseconds as profiled; images_per_s was measured without the profiler."""

CPU_FLOPS = 35e9
"""FLOP/s of a core in training steps and predictions of UNets in fp32: 34 to 37 in tiny, batch 64, and sd2, batch 1."""
CPU_WHERE = "AMD EPYC at 2.4 GHz without AVX-512, 2 cores (benchmarks/results/unet-fp32-amd-epyc-2-cores.md)"
DECODED_PIXELS = 50e6
"""Pixels of 512x384 JPEGs that a core decodes, resizes and crops in a second: 241 to 357 pictures."""
DECODED_WHERE = "AMD EPYC, 2 cores (benchmarks/results/encode-sd-vae-256-amd-epyc-2-cores.md)"


@cache
def profiled() -> tuple[Cost, float]:
    """The cost of the profiled step, and the numbers that its layers keep."""
    cost = unet_cost(SD2, IMAGES, SIDE, SIDE, TOKENS)
    return cost, sum(kept_bytes(cost, "fp32").values()) / 4


def carried_over(profile: Profile, cost: Cost, micro_batches: int) -> float:
    """Seconds of a step of another network on the profiled GPU: each kind of FLOPs at its measured rate, the rest in
    proportion to the numbers that layers keep, the optimizer to parameters. cost: of a micro-batch."""
    reference, elements = profiled()
    theirs, ours = reference.training_flops(), cost.training_flops()
    seconds = sum(1e-3 * profile.milliseconds[kind] * ours[kind] / theirs[kind] for kind in theirs)
    seconds += 1e-3 * profile.other * sum(kept_bytes(cost, "fp32").values()) / 4 / elements
    optimizer = 1e-3 * profile.optimizer * cost.parameters / reference.parameters
    whole = 1e-3 * (sum(profile.milliseconds.values()) + profile.other + profile.optimizer)
    correction = IMAGES / profile.images_per_s / whole  # what the profiler itself cost, or gaps that it does not show
    return correction * (micro_batches * seconds + optimizer)


def is_profiled(cost: Cost) -> bool:
    """Whether a cost is that of the profiled step itself, whatever its micro-batch."""
    reference, _ = profiled()
    if cost.parameters != reference.parameters or not cost.inputs:
        return False
    images = cost.inputs / (reference.inputs / IMAGES)
    flops, theirs = sum(cost.training_flops().values()), sum(reference.training_flops().values())
    return abs(flops / images / (theirs / IMAGES) - 1) < 1e-3 and IMAGES / 2 <= images <= 2 * IMAGES
