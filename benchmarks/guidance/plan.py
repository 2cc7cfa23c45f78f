"""What the figures of guidance measure, and their sizes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.errors import ConfigError, DestinationExists

PLAN_FILE = "plan.json"
LEFT_BEHIND = ("evals", "diffusers", "wandb", "given", "lease", "report.html", "samples.png")
"""What of a run is not copied: results, and what only its training needs."""


@dataclass(frozen=True)
class Plan:
    """Sizes. Weights and strengths are those of the how-to pages; two seeds each, of the noise alone."""

    images: int = 128
    """Pictures of a cell: of classifier guidance, img2img, kept masks, and CLIP's measurement."""
    few: int = 64
    """Pictures of a cell of image guidance, of each weight that CLIP's is chosen from, and of halves that are kept."""
    seeds: tuple[int, ...] = (0, 1)
    clip_seeds: tuple[int, ...] = (1, 2)
    """Of CLIP's measurement: others than the seed on which its weight was chosen, as the captions are."""
    choice_seed: int = 0
    sampler: str = "dpmpp_2m"
    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m", "unipc")
    steps: int = 20
    classifier: tuple[float, ...] = (4.0, 2.0, -2.0)
    image: tuple[float, ...] = (2.0, 8.0)
    clip: tuple[float, ...] = (0.25, 0.5, 1.0)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    kept_guide: float = 0.25
    """Weight of the guide to the kept half, which has eight times the pixels of a whole picture that was divided by
    four; for that the weight is 2."""


QUICK = Plan(
    images=4,
    few=4,
    seeds=(0,),
    clip_seeds=(1,),
    samplers=("ddim", "dpmpp_2m"),
    steps=4,
    classifier=(4.0, -2.0),
    image=(2.0,),
    clip=(0.5,),
    strengths=(0.25, 1.0),
)
"""Everything once with tiny sizes: it says nothing about guidance."""


@dataclass(frozen=True)
class Places:
    """Where everything lies. dest: what is written. demo: folder of `latentmill demo tasks=all`. classifier: its
    run."""

    dest: Path
    demo: Path
    classifier: Path

    @property
    def run(self) -> Path:
        """A copy of the model without conditioning, whose evaluations are written."""
        return self.dest / "unconditional"

    @property
    def val(self) -> Path:
        return self.demo / "data" / "cache-val"

    @property
    def others(self) -> Path:
        """A cache of other captions that training never saw."""
        return self.demo / "data" / "cache-ref"

    @property
    def reference(self) -> Path:
        return self.demo / "data" / "reference.safetensors"

    def kept(self, name: str, seed: int) -> Path:
        return self.dest / "kept" / f"{name}-{seed}.json"

    def require(self) -> None:
        """Raise ConfigError for what is not there."""
        makers = {
            self.demo / "unconditional" / "config.yaml": f"latentmill demo tasks=all dest={self.demo}",
            self.val / "manifest.json": f"latentmill demo tasks=all dest={self.demo}",
            self.others / "manifest.json": f"latentmill demo tasks=all dest={self.demo}",
            self.reference: f"latentmill demo tasks=all dest={self.demo}",
            self.classifier / "config.yaml": f"latentmill train experiment=shapes_classifier data.train="
            f"{self.demo}/data/cache data.val={self.val} run={self.classifier}",
        }
        for path, command in makers.items():
            if not path.is_file():
                raise ConfigError(f"{path} is not there: make it with {command}")


def copy_run(places: Places) -> None:
    """Copy the run that is evaluated, so that the demo's folder stays as it is. Nothing where the copy is there."""
    if places.run.is_dir():
        return
    half = places.run.with_name(f"{places.run.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(places.demo / "unconditional", half, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    half.rename(places.run)


def settle(plan: Plan, dest: Path) -> None:
    """Keep the plan in `dest`. Raises DestinationExists where figures of other sizes were begun, or something else
    is."""
    path, text = dest / PLAN_FILE, json.dumps(asdict(plan), indent=1) + "\n"
    if path.is_file():
        there, here = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        names = [field.name for field in fields(Plan) if there.get(field.name) != here[field.name]]
        if names:
            raise DestinationExists(
                f"{dest} holds figures of other sizes ({', '.join(names)}): go on with the options that it was begun "
                "with, or name another folder"
            )
        return
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise DestinationExists(f"{dest} is there and holds no figures of guidance: name another folder")
    dest.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
