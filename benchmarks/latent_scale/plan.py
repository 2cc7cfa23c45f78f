"""What the study of latent scales compares, and its sizes.

Rombach et al. 2021 find that the variance of latents, over that of the noise, decides in which denoising steps a
picture is composed, and with it how well a model draws pictures that are larger than those it was trained on (section
4.3.2, appendix D.1). A cache of latentmill has latents of variance 1; here they are multiplied by other numbers before
the same model is trained on them for the same number of samples, with one noise schedule. One more arm has large
latents and a schedule with as much more noise, so that the ratio is that of variance 1 again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.config import DiffusionConfig
from pipeline.errors import DestinationExists

PIXELS = 64
"""Side of the pictures that are trained on."""
PLAN_FILE = "study.json"
BETAS = (0.00085, 0.012)
"""First and last beta of the usual schedule (pipeline/config/model.py)."""


@dataclass(frozen=True)
class Arm:
    """One scale of latents. factor: what latents of variance 1 are multiplied by. betas: of the schedule (first,
    last)."""

    name: str
    factor: float
    words: str
    betas: tuple[float, float] = BETAS

    @property
    def diffusion(self) -> DiffusionConfig:
        """The process that its model is trained with."""
        return DiffusionConfig(prediction="v", beta_start=self.betas[0], beta_end=self.betas[1])


ARMS = (
    Arm("x0.3", 0.3, "latents x 0.3"),
    Arm("x1", 1.0, "latents of variance 1"),
    Arm("x3.2", 3.2, "latents x 3.2"),
    # Scaled-linear betas whose signal-to-noise ratio at each timestep is 1 / 3.2^2 of the usual, within a factor of 1.4
    # (`mismatch`), so that 3.2 times as large latents have the usual ratio.
    Arm("x3.2 shifted", 3.2, "latents x 3.2, and more noise", (0.0062, 0.0092)),
)
USUAL = ARMS[1]


@dataclass(frozen=True)
class Plan:
    """Sizes of the study. arms: their names. seeds: of training and of the pictures' noise, a run of each arm for
    each. maps: label maps that training never saw, for each of which a picture is drawn, alone and beside others.
    sides, large: pictures of side x side maps, at all checkpoints and at the last one alone. repeated: how many maps
    are drawn four times side by side."""

    arms: tuple[str, ...] = tuple(arm.name for arm in ARMS)
    seeds: tuple[int, ...] = (0, 1)
    train_images: int = 6_000
    maps: int = 256
    samples: int = 16_000
    batch: int = 32
    parts: int = 4
    """Equal parts of training, after each of which there is a checkpoint."""
    points: tuple[int, ...] = (1, 2, 4)
    """Parts after which pictures are drawn."""
    sides: tuple[int, ...] = (1, 2)
    large: tuple[int, ...] = (4, 8)
    repeated: int = 32
    walk: int = 64
    """Maps whose pictures are looked at after each denoising step."""
    sampler: str = "unipc"
    steps: int = 12
    processes: int = 2
    threads: int = 0
    """Of each process; 0 = the machine's cores / processes. On a busy machine threads wait for one another."""
    engine: str = "zero2"
    precision: str = "bf16"

    @property
    def chosen(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in ARMS if arm.name in self.arms)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Samples after which pictures are drawn."""
        return tuple(self.samples // self.parts * part for part in self.points)


SHORT = Plan(
    seeds=(0,),
    train_images=2_000,
    maps=128,
    samples=9_600,
    batch=16,
    points=(2, 4),
    large=(),
    repeated=16,
    walk=64,
    processes=1,
    threads=1,
    engine="off",
)
"""A first look, for a machine that is busy: models are far from trained."""
QUICK = Plan(
    arms=("x1", "x3.2 shifted"),
    seeds=(0,),
    train_images=48,
    maps=16,
    samples=32,
    batch=8,
    parts=2,
    points=(1, 2),
    large=(4,),
    repeated=2,
    walk=4,
    steps=3,
    processes=1,
    engine="off",
    precision="fp32",
)
"""Everything once, in a minute or two: it says nothing about scales."""


def log_ratio(arm: Arm, timestep: int) -> float:
    """Natural logarithm of the signal-to-noise ratio Var(z) alpha^2 / sigma^2 at a timestep."""
    return log_ratios(arm)[timestep]


def log_ratios(arm: Arm) -> list[float]:
    """The same at each timestep."""
    from pipeline.diffusion.schedule import Schedule

    alpha_bar = Schedule(arm.diffusion).alpha_bar
    return (2 * math.log(arm.factor) + (alpha_bar / (1 - alpha_bar)).log()).tolist()


def equal_at(arm: Arm) -> int:
    """The last timestep at which there is at least as much signal as noise; -1 for none."""
    return max((timestep for timestep, ratio in enumerate(log_ratios(arm)) if ratio >= 0), default=-1)


def mismatch(arm: Arm) -> float:
    """The largest factor between its signal-to-noise ratio and that of the usual arm, over all timesteps."""
    return math.exp(max(abs(a - b) for a, b in zip(log_ratios(arm), log_ratios(USUAL), strict=True)))


def settle(plan: Plan, dest: Path) -> None:
    """Keep the plan of the study at `dest` from its beginning. Raises DestinationExists where another was begun."""
    path, tree = dest / PLAN_FILE, json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != tree:
            names = [field.name for field in fields(Plan) if there.get(field.name) != tree[field.name]]
            raise DestinationExists(
                f"{dest} holds a study with other sizes ({', '.join(names)}): go on with the options that it was begun "
                "with, or name another folder"
            )
        return
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise DestinationExists(f"{dest} is there and holds no study: name another folder")
    dest.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
