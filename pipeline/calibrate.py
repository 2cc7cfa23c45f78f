"""latentmill calibrate: measure for a minute how fast this machine trains, encodes and samples.

Plans (`latentmill plan`, and the line that `latentmill submit` prints) read what it writes. Every rank that the
configuration asks for measures at the same time, as ranks of a run share memory bandwidth and cores.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pipeline.config import CalibrateConfig
from pipeline.distributed.exits import leave
from pipeline.distributed.place import adopt_step, in_world, require_place
from pipeline.distributed.ranks import run_ranks
from pipeline.errors import ConfigError, LatentmillError
from pipeline.log import show
from pipeline.planning.rates.calibration import add, place_of, require_writable

if TYPE_CHECKING:
    from pipeline.planning.rates.calibration import Calibration


def main(config: CalibrateConfig) -> int:
    """The verb. Returns the exit status; raises LatentmillError."""
    require_place(config.launch.processes)
    adopt_step()
    if not in_world() and config.launch.processes > 1:
        return run_ranks("calibrate", config, config.launch.processes, config.launch.threads)
    return as_rank(config)


def as_rank(config: CalibrateConfig) -> int:
    """Measure as the rank that the environment gives this process; rank 0 writes the file."""
    import torch

    from pipeline.distributed import world as distributed
    from pipeline.training.pace.calibrating import calibrate

    world = distributed.start(config.device, config.launch.threads)
    began, place = time.monotonic(), place_of(config.dest)
    try:
        world.together(lambda: require_writable(place), rank=0)
        try:
            calibration = calibrate(config, world)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"rank {world.rank} has too little memory for a layer or a network that is measured "
                f"({str(error).partition('.')[0]}): lower micro_batch, or leave experiment= out"
            ) from None
        world.together(lambda: add(place, calibration), rank=0)
    except LatentmillError as error:
        if world.rank == 0 or not distributed.is_shared(error):
            raise
        return error.exit_code  # rank 0 reports it for all ranks
    if world.rank == 0:
        show(described(calibration, time.monotonic() - began))
        show(f"rates: {place}")
    distributed.stop(world)
    return 0


def described(calibration: Calibration, seconds: float) -> str:
    """What was measured, for people: each network's step, and how near the fitted model comes to it."""
    one = calibration
    lines = [f"calibrated in {seconds:.0f} s: {one.words}"]
    for kind in ("conv", "linear", "attention"):
        rates = [rate.training for rate in one.layers if rate.kind == kind]
        lines.append(f"  {kind:<10} {min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f} GFLOP/s a rank, by size")
    for network in one.networks:
        fit = network.fitted_s / network.step_s - 1
        lines.append(
            f"  {network.name:<44} {1e3 * network.step_s:8.1f} ms a step, {network.images_per_s:8.2f} images/s a rank; "
            f"fitted {fit:+.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from pipeline import cli

    leave(cli.main(["calibrate", *sys.argv[1:]]))
