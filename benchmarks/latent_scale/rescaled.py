"""Writes the demo's autoencoder with another scaling_factor, so that latents are `factor` times as large.

.venv/bin/python -m benchmarks.latent_scale.rescaled factor=3.2 dest=FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.encoding.presets import changed
from pipeline.distributed.exits import guarded


@dataclass(frozen=True)
class Settings:
    """What to write."""

    factor: float = 1.0
    dest: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded("benchmarks.latent_scale.rescaled", lambda: run(changed(Settings(), words)))


def run(settings: Settings) -> int:
    """The weights as they are; config.json, written last, with the demo's scaling_factor times `factor`."""
    from pipeline.models.encoders.autoencoder import CONFIG, DEMO, WEIGHTS

    dest = Path(settings.dest)
    dest.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(DEMO / WEIGHTS, dest / WEIGHTS)
    config = json.loads((DEMO / CONFIG).read_text(encoding="utf-8"))
    config["scaling_factor"] *= settings.factor
    (dest / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"{dest}: scaling_factor {config['scaling_factor']:g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
