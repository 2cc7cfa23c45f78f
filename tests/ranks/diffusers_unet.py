"""examples/diffusers_unet.py as a rank, where torchvision may be of another build than PyTorch:
`python -m ranks.diffusers_unet WORDS`."""

from __future__ import annotations

import sys

from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

if __name__ == "__main__":
    declare_torchvision_ops()  # before the example imports diffusers
    from examples.diffusers_unet import main

    raise SystemExit(main(sys.argv[1:]))
