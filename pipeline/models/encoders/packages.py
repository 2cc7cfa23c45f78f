"""diffusers and open_clip. Their import takes seconds, so functions that build encoders import this module when they
run, and nothing imports it at its top."""

from __future__ import annotations

from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()

import open_clip  # noqa: E402
from diffusers import AutoencoderKL, VQModel  # noqa: E402

__all__ = ["AutoencoderKL", "VQModel", "open_clip"]
