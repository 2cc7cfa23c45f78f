"""Measures a decode in a process of its own: `python -m ranks.decode_peak_job '{"block_out_channels": ...}' SIDE`.

Prints the peak resident memory in bytes, as the kernel counts it, less the memory before. One picture of SIDE x SIDE
pixels by an AutoencoderKL of random weights.
"""

from __future__ import annotations

import json
import sys

import psutil
import torch

from pipeline.models.encoders import packages
from pipeline.models.encoders.first_stage import KLStage
from ranks.peak_job import most_resident


def main(config: str, side: str) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stage = KLStage(packages.AutoencoderKL.from_config(json.loads(config)), torch.float32, torch.device("cpu"))
    stage.decode(torch.randn(1, 4, 2, 2))
    before = psutil.Process().memory_info().rss
    stage.decode(torch.randn(1, 4, int(side) // 8, int(side) // 8))
    print(most_resident() - before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
