"""latentmill synth: the captioned-shapes world, 64x64 pictures of one to three shapes in shards like img2dataset's.

Every picture is a pure function of (seed, index, split), which key a Philox generator, so batches and shards may be cut
anywhere. The distribution is fixed:

- one, two or three objects with probability 0.5, 0.35, 0.15, on a flat grey of 200 to 245;
- shapes circle, square, triangle (upright, isosceles, filling its box) and cross (arms a third of its width);
- six colours, each channel jittered by up to 10; no two objects of a scene share colour and shape;
- small (radius 7 to 8 pixels) or large (12 to 13), centres continuous, whole within a margin of 1 pixel, boxes never
  nearer than 3 pixels to each other, edges anti-aliased;
- captions as in captions.py.

The splits, and what training never shows:

- "train" shows none of 12 of the 48 (size, colour, shape) triples (`captions.is_held_out`), and none of its captions
  is reserved (`captions.is_reserved`: one string in four, by its hash).
- "val" is drawn like "train", but all of its captions are reserved, so none of them occurs in training.
- "heldout" shows at least one held-out triple in every scene, and names its size. It is harder than unseen captions:
  the pair of colour and shape occurs in training only at the other size.
- "all" is unrestricted; the demo encoders are trained on it.

With single=true every scene has one object: those scenes of the same seed that have one anyway are the same. With
classes=true the class of the largest object (by the side of its box) is written beside each picture.
"""

from __future__ import annotations

import sys
import time

from pipeline.config import SynthConfig
from pipeline.log import show
from pipeline.tracking.progress import Progress
from preprocess.shapes.shards import write_shards


def main(config: SynthConfig) -> None:
    """Runs the verb `latentmill synth`."""
    started = time.monotonic()
    with Progress(config.images, "synth", "images") as bar:
        summary, new_shards = write_shards(
            config.dest,
            config.images,
            config.seed,
            config.split,
            config.shard_size,
            bar.update,
            single=config.single,
            classes=config.classes,
        )
    contents = f"{config.images:,} images in {len(summary['shards']):,} shards"
    show(
        f"{config.dest}: {contents}, "
        + (f"written in {time.monotonic() - started:.1f} s" if new_shards else "already there")
    )


if __name__ == "__main__":
    from pipeline.cli import main as cli_main

    raise SystemExit(cli_main(["synth", *sys.argv[1:]]))
