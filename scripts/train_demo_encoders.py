"""Rebuilds the encoders that ship in pipeline/assets/demo.

    python scripts/train_demo_encoders.py all        makes tokenizer, autoencoder, CLIP and hashes.json
    python scripts/train_demo_encoders.py vae        makes one of them (tokenizer, vae, clip)

The number of steps is fixed, so that a rerun makes the same encoders up to the arithmetic of the machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # finds the checkout, even if it is not installed

import torch  # noqa: E402

from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops  # noqa: E402

declare_torchvision_ops()

from demo_encoders import clip, manifest, tokenizer, vae  # noqa: E402


def main() -> None:
    """Parses the command line and trains the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tokenizer", "vae", "clip", "all"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; each part has its own default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--every-minutes", type=float, default=5.0, help="minutes between CLIP's provisional weights")
    parser.add_argument("--dest", type=Path, default=ROOT / "pipeline" / "assets" / "demo")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.part in ("tokenizer", "all"):
        tokenizer.build(args.dest / "clip")
    if args.part in ("vae", "all"):
        steps = args.steps or vae.STEPS
        figures = vae.train(args.dest / "vae", args.seed, steps)
        manifest.record(args.dest, "vae", figures, seed=args.seed, steps=steps)
    if args.part in ("clip", "all"):
        steps = args.steps or clip.STEPS
        figures = clip.train(args.dest / "clip", args.seed, steps, args.every_minutes)
        manifest.record(args.dest, "clip", figures, seed=args.seed, steps=steps)


if __name__ == "__main__":
    main()
