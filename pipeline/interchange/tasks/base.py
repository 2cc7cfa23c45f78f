"""The interface of a task's export: what a folder of diffusers and a file in CompVis' names hold of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from pipeline.conditions.facts import Conditions
from pipeline.config import TaskConfig
from pipeline.config.loading.merge import to_dict
from pipeline.config.tasks.found import facts_of, found
from pipeline.errors import ConfigError
from pipeline.inference.trained import Trained
from pipeline.interchange import clip
from pipeline.interchange.tasks.loops import Readme
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower

TASK_FACTS, TASK_WEIGHTS, CLASSES = "task.json", "task.safetensors", "class_embedding.safetensors"
COND_STAGE = "cond_stage_model."
OPTIONAL = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
OPTIONAL["requires_safety_checker"] = False  # type: ignore[assignment]
"""Parts of Stable Diffusion's pipelines that a run does not have."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a folder of diffusers holds, besides the UNet and the scheduler."""

    readme: Readme
    """The text of README.md."""
    pipeline: str = ""
    """Class of diffusers that model_index.json names; "" = none runs the model, and README.md has a loop."""
    why: str = ""
    """Why none does, for the terminal."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of model_index.json."""
    vae: str = "vae"
    """Folder of the autoencoder: the pipeline's name for it."""
    scale: float | None = None
    """The scale of latents that the pipeline undoes, where it is not the autoencoder's own: the exported autoencoder's
    1x1 convolutions take over the rest, and the shift (folded.py). None = the autoencoder as it is."""
    mean_only: bool = False
    """Whether the exported autoencoder's posterior has no variance, so that a pipeline that samples it gets the mean
    that the model was trained on."""
    text_encoder: bool = False
    """Whether the text tower and its tokenizer are in it."""
    tokenizer: bool = False
    """Whether its tokenizer alone is."""
    vectors: Tensor | None = None
    """Every vector (N, V) that the UNet may be given, which becomes a table of class embeddings."""
    schedulers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Folder -> configuration of further schedulers."""
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """File -> the task's weights in it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The content of task.json, which `init=` reads as well; {} = none is written."""


class Export(ABC):
    """The export of one run's task. Everything that cannot be exported is refused here, before anything is written."""

    def __init__(self, trained: Trained, denoiser: Denoiser) -> None:
        self.trained, self.denoiser = trained, denoiser
        self.contract = trained.contract
        self.config: TaskConfig = trained.info.config.task

    @property
    def reads_states(self) -> bool:
        """Whether the UNet attends to the text tower's states."""
        return "text" in self.config.members

    @abstractmethod
    def plan(self, scheduler: Mapping[str, Any], first_stage: FirstStage, tower: TextTower | None) -> Plan:
        """What the folder holds. scheduler: the configuration of the exported one. Raises ConfigError."""

    def compvis(self) -> dict[str, Tensor]:
        """The task's weights under CompVis' names, {} where it has none."""
        return {}

    def vectors(self) -> Tensor | None:
        """Every vector (N, V) that the UNet may be given, by the number under which CompVis' label_emb has it."""
        return None

    @classmethod
    def adopt(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's own weights, under our names, of a file in CompVis' names; {} where it has none of them."""
        return {}

    @classmethod
    def inputs(cls, conditions: Conditions) -> str:
        """What the task concatenates to the latent, in words and in order; "" for nothing."""
        return ""

    @property
    def tells(self) -> bool:
        """Whether files say facts of the task: where it is more than captions from the text tower, or nothing."""
        return bool(self.config.conditions) or bool(self.weights())

    def note(self) -> str:
        """A line about what CompVis' own code does not do with the file, or ""."""
        return ""

    def facts(self) -> dict[str, Any]:
        """What a reader of the task's weights must know: its keys, the cache's conditions, and the latents'."""
        conditions = {name: value for name, value in asdict(self.contract.conditions).items() if value}
        latents = {name: getattr(self.contract, name) for name in ("latent_shape", "downsampling", "scale", "shift")}
        return {"task": to_dict(self.config), "conditions": conditions, "latents": latents, "text": self._text()}

    def weights(self) -> dict[str, Tensor]:
        """The task's own weights under our names, float32 on the CPU."""
        state = self.denoiser.task.state_dict()
        return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}

    def _text(self) -> dict[str, Any] | None:
        text = self.contract.text
        return None if text is None or not self.config.takes_text else {"storage": text.storage, "length": text.length}

    def require_clip(self, tower: TextTower | None) -> None:
        """Raise ConfigError where the loop of README.md needs the text tower and transformers cannot hold it."""
        if self.reads_states and (tower is None or not clip.is_clip(tower)):
            raise ConfigError(
                f"task={self.config.name} reads captions, and transformers' CLIPTextModel cannot hold this run's text "
                "tower, so no folder could run it: export format=compvis, which holds the UNet"
            )


def export_of(trained: Trained, denoiser: Denoiser) -> Export:
    """The export of a run, as the table of tasks names it."""
    export: Export = found(facts_of(trained.info.config.task).export)(trained, denoiser)
    return export


def under(names: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors under a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in names.items()}


def beneath(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors that are under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
