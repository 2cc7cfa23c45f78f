"""The table of docs/explained/memory_model.md, calculated: `.venv/bin/python -m benchmarks.unet_cost [MODEL ...]`."""

from __future__ import annotations

import sys

from benchmarks.machine import table
from pipeline.config.loading.load import load
from pipeline.planning.cost import unet_cost
from pipeline.planning.memory import activation_bytes, recompute

HEAD = (
    "model, pixels",
    "forward, GFLOP",
    "convolutions / linear / attention",
    "forward + backward",
    "everything recomputed",
    "kept in bf16",
    "with every block recomputed",
    "half of it kept",
)
TOKENS, DOWNSAMPLING = 77, 8


def row(model: str, pixels: int) -> list[str]:
    """Of one image."""
    config = load("train", [f"model={model}", "data.train=none", "run=none"]).model
    side = pixels // DOWNSAMPLING
    cost = unet_cost(config, 1, side, side, TOKENS)
    forward = cost.forward_flops()
    every = [part.name for part in cost.parts if part.block]
    stored, least = (activation_bytes(cost, "bf16", names) for names in ((), every))
    half = recompute(config, 1, side, side, TOKENS, stored // 2, "bf16")
    once, all_again, half_again = (sum(cost.training_flops(names).values()) for names in ((), every, half))
    return [
        f"{model}, {pixels}",
        f"{sum(forward.values()) / 1e9:,.0f}",
        " / ".join(f"{flops / sum(forward.values()):.0%}" for flops in forward.values()),
        f"{once / 1e9:,.0f}",
        f"+{all_again / once - 1:.0%}",
        f"{stored / 1e6:,.0f} MB",
        f"{least / 1e6:,.0f} MB",
        f"{len(half)} blocks, +{half_again / once - 1:.0%}",
    ]


if __name__ == "__main__":
    print(table(HEAD, [row(model, pixels) for model in sys.argv[1:] or ("sd1", "sd2") for pixels in (256, 512)]))
