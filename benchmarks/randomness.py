"""What a sample's random draws cost, on the CPU and on a GPU if there is one: where should they be drawn?

.venv/bin/python -m benchmarks.randomness
"""

from __future__ import annotations

import time

import torch

from benchmarks.machine import machine, median, table
from pipeline.config import DiffusionConfig
from pipeline.diffusion.objective import training_randomness

SHAPE = (4, 64, 64)  # of a latent
BATCH = 64
ROUNDS = 20


def main() -> int:
    """Prints microseconds a sample, and the bytes that drawing elsewhere would send to the device."""
    torch.set_num_threads(1)
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        numbers = torch.arange(BATCH, device=device)
        times = []
        for turn in range(ROUNDS):
            began = time.perf_counter()
            draws = training_randomness(0, numbers + turn * BATCH, SHAPE, DiffusionConfig(), 0.1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / BATCH * 1e6)
        rows.append([f"drawn on {device.type}", f"{median(times[1:]):.1f} us a sample"])
    sent = draws.posterior[0].nbytes + draws.noise[0].nbytes
    stored = 2 * draws.noise[0].numel() * 2
    rows.append(["bytes of them a sample, to be sent if drawn elsewhere", f"{sent:,}"])
    rows.append(["bytes of the moments a sample, which are sent anyway", f"{stored:,}"])
    print("\n".join(["# python -m benchmarks.randomness", "", *machine(devices[-1], 1), ""]))
    print(table(["what", "measured"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
