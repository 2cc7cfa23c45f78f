"""The figures of an autoencoder's training on one NVIDIA GPU, in one command of some five minutes:

    .venv/bin/python -m benchmarks.gpu_autoencoder

Stable Diffusion's first stage and the paper's VQ one at 256 pixels in bf16, with the VGG perceptual distance, beside
diffusers' training scripts (benchmarks/autoencoder.py); tables go to benchmarks/results/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import autoencoder
from pipeline.distributed.exits import guarded

PLAN = autoencoder.Plan(
    cases="kl_f8,vq_f4",
    batch=8,
    side=256,
    perceptual="vgg",
    precision="bf16",
    device="cuda",
    rounds=4,
    steps=6,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns exit status 1 without a GPU."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words:
        print(f"benchmarks.gpu_autoencoder takes no arguments, not {' '.join(words)}\n\n{__doc__}", file=sys.stderr)
        return 0 if words[0] in ("-h", "--help") else 2
    return guarded(
        "benchmarks.gpu_autoencoder",
        lambda: autoencoder.run(PLAN, "python -m benchmarks.gpu_autoencoder", write=True),
    )


if __name__ == "__main__":
    raise SystemExit(main())
