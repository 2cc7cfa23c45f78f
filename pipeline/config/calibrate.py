"""latentmill calibrate: how fast this machine trains, encodes and samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.run import LaunchConfig
from pipeline.config.values.bounds import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """latentmill calibrate: measure for a minute how fast this machine computes layers of networks, trains small
    networks, encodes and samples, and write it into a file from which `latentmill plan` and `latentmill submit` tell
    hours."""

    dest: str = ""
    """File to write, a local one; what it holds of other devices, numbers of processes and precisions stays. "" = that
    of LATENTMILL_RATES, else ~/.config/latentmill/rates.json."""
    experiment: str = ""
    """Experiment of `latentmill train` or `latentmill autoencoder` whose network is measured too, as itself; "" =
    none."""
    data: str = ""
    """Cache that tells the sizes of that experiment's latents or pictures, and of its captions; "" = those of `side`
    and `tokens`."""
    side: Annotated[int, Ge(0)] = 0
    """Side of that experiment's latents, or of an autoencoder's pictures; 0 = 32, or 256 pixels."""
    tokens: Annotated[int, Ge(1)] = 77
    """Tokens that the network attends to, where it attends to any."""
    micro_batch: Annotated[int, Ge(0)] = 0
    """Images of its micro-batch; 0 = as the experiment has it, on so many processes."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes that train at the same time on this machine, and threads of each, as the runs will have them."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As precision of `latentmill train`."""
    compile: bool = False
    """Compile the networks that are trained, as compile of `latentmill train`: this takes minutes more."""
    seconds: Annotated[float, Gt(0)] = 45.0
    """Time that the measurements may take together, without imports and building networks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure; auto = cuda where there is a GPU, else cpu."""
