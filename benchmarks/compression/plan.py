"""What the compression study compares, and its sizes.

Rombach et al. 2021 compare denoisers of one number of parameters at f = 1 to 32 after the same time on one GPU (section
4.1; appendix E, tables 13 and 14). Here:

- The denoisers have the same two inner levels, of 8x8 and 4x4 positions, and for each halving of f one more level of
  32 channels around them, so that all have about 4.3 million parameters.
- Each trains on as many samples as pass it in the same number of minutes when it has the machine to itself: a short
  run of the same command measures that before any is trained, and all times of the study follow from it. So nothing
  of it changes when something else runs beside a long training. Batch, learning rate and noise schedule are the same
  for all.
- Each first stage trains for the same number of minutes as each other one, by the same rule; f = 1 has none.
- Latents have the channels of Rombach et al.'s KL autoencoders (their table 8): 2 at f = 2, 3 at f = 4, 4 at f = 8.
  Pictures of 64 pixels then are 12,288, 2,048, 768 and 256 numbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import DestinationExists

PIXELS = 64
"""Side of the pictures."""
TEXT_LENGTH = 24
"""Tokens of a caption's context, as conf/encoders/demo.yaml has them."""
PLAN_FILE = "study.json"


@dataclass(frozen=True)
class Level:
    """One f. latent_channels: C. multipliers: of the denoiser's levels, of `channels` each. stage: architecture of its
    first stage (conf/autoencoder/), "" = none.

    stage_rate, rate: images/s of training the first stage and the denoiser, guesses for 2 cores of an AMD EPYC (Zen 4).
    `--list` makes its times from them; the study itself measures.
    """

    f: int
    latent_channels: int
    channels: int
    multipliers: tuple[int, ...]
    stage: str
    stage_rate: float
    rate: float

    @property
    def attention(self) -> tuple[int, int]:
        """Downsampling factors of the latent at which there are 8x8 and 4x4 positions."""
        return 8 // self.f, 16 // self.f

    @property
    def side(self) -> int:
        """Positions of the latent along a side."""
        return PIXELS // self.f


LEVELS = (
    Level(1, 3, 32, (1, 1, 1, 2, 4), "", 0.0, 33.0),
    Level(2, 2, 32, (1, 1, 2, 4), "kl_small_f2", 85.0, 75.0),
    Level(4, 3, 32, (1, 2, 4), "kl_small_f4", 85.0, 105.0),
    Level(8, 4, 64, (1, 2), "kl_small", 85.0, 130.0),
)


@dataclass(frozen=True)
class Plan:
    """Sizes of the study."""

    factors: tuple[int, ...] = (1, 2, 4, 8)
    train_images: int = 20_000
    val_images: int = 512
    """Captions that training never saw; each evaluation draws a picture for each of them."""
    reference_images: int = 2_000
    """Real pictures that FID compares with."""
    stage_batch: int = 16
    batch: int = 32
    stage_minutes: float = 5.0
    """Training time of each first stage."""
    denoiser_minutes: float = 15.0
    """Training time of each denoiser."""
    probe_steps: int = 24
    """Steps of the short runs that tell how long a step takes."""
    parts: int = 8
    """Equal parts of a denoiser's training, after each of which there is a checkpoint."""
    points: tuple[int, ...] = (1, 2, 4, 8)
    """Parts after which quality is measured."""
    sampler: str = "unipc"
    steps: int = 8
    """Denoising steps of these measurements."""
    sweep: tuple[int, ...] = (4, 16)
    """Further numbers of denoising steps at the end of training."""
    speed_images: int = 64
    speed_rounds: int = 2
    processes: int = 2
    engine: str = "zero2"
    precision: str = "bf16"
    min_psnr: float = 20.0
    """Smallest median PSNR in dB of a cache's latents, which `verify` demands."""
    seed: int = 0

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(level for level in LEVELS if level.f in self.factors)

    @property
    def stage_seconds(self) -> float:
        return 60 * self.stage_minutes

    @property
    def denoiser_seconds(self) -> float:
        return 60 * self.denoiser_minutes


QUICK = Plan(
    factors=(1, 4),
    train_images=48,
    val_images=8,
    reference_images=24,
    stage_batch=8,
    batch=8,
    stage_minutes=0.06,
    denoiser_minutes=0.06,
    probe_steps=3,
    parts=2,
    points=(2,),
    steps=2,
    sweep=(1,),
    speed_images=4,
    speed_rounds=1,
    processes=1,
    engine="off",
    precision="fp32",
    min_psnr=0.0,
)
"""Everything once, in a minute or two: it says nothing about f."""


def settle(plan: Plan, dest: Path) -> Plan:
    """The plan of the study at `dest`, which is kept there from its beginning. Raises DestinationExists where another
    was begun."""
    path = dest / PLAN_FILE
    if path.is_file():
        there = plan_of(json.loads(path.read_text(encoding="utf-8")))
        if there != plan:
            names = [field.name for field in fields(Plan) if getattr(there, field.name) != getattr(plan, field.name)]
            raise DestinationExists(
                f"{dest} holds a study with other sizes ({', '.join(names)}): go on with the options that it was begun "
                "with, or name another folder"
            )
        return there
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise DestinationExists(f"{dest} is there and holds no study: name another folder")
    dest.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    return plan


def plan_of(tree: dict[str, Any]) -> Plan:
    """A plan from its JSON."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}
    return Plan(**values)
