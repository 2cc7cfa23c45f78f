"""What published weights, or those of another run, tell of their task: its own weights, and how its inputs are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from pipeline.conditions.facts import Conditions, MaskFacts
from pipeline.config import TaskConfig
from pipeline.config.tasks.found import facts_of, found
from pipeline.config.values.bounds import Gt
from pipeline.errors import ParseError, WeightsError
from pipeline.models.weights import read_file
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json

STABLE_DIFFUSION = MaskFacts(kinds=("rectangles",), pooling="nearest")
"""Stable Diffusion's: mask, then masked latent; 0 and 1; a grey hole; nearest."""
ROMBACH = replace(STABLE_DIFFUSION, order="masked_mask", low=-1, hole="black")
"""Rombach et al.'s: masked latent, then mask; -1 and 1; a black hole; nearest."""
BY_CHANNELS = {(4, 9): STABLE_DIFFUSION, (3, 7): ROMBACH}
"""Channels of the latent and of the first convolution -> how inpainting of that size was published."""
COMPARED = ("order", "low", "hole", "pooling")
JSON_BYTES = 64 << 20
TASK_FACTS, INPAINT = "task.json", "StableDiffusionInpaintPipeline"
FILES = {"task.safetensors": {}, "class_embedding.safetensors": {"weight": "embed.weight"}}
"""Files with a task's weights in our folders, and the names of ours that theirs stand for."""


@dataclass(frozen=True)
class Learned:
    """What is known of the task of initial weights."""

    name: str | None = None
    """The task; None = not told."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its keys, {} = not told."""
    conditions: Conditions = field(default_factory=Conditions)
    """Of the cache that it was trained on."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """Its own weights under our names, float32."""
    scaling: tuple[float, float] | None = None
    """Scale and shift of the latents that it was trained on, which a folder's autoencoder may have in its weights; None
    = not told."""


@dataclass(frozen=True)
class _Told:
    """What task.json and the metadata of our single files tell."""

    task: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Latents:
    """What they tell of the latents."""

    scale: Annotated[float, Gt(0)] | None = None
    shift: float = 0.0


def of_facts(facts: Mapping[str, Any], state: Mapping[str, Tensor], where: Path) -> Learned:
    """Of the facts that an export of ours tells. Raises WeightsError where they are damaged."""
    try:
        told = build(_Told, dict(facts), unknown="pass")
        conditions, latents = build(Conditions, told.conditions), build(_Latents, told.latents, unknown="pass")
    except ParseError as error:
        raise WeightsError(f"{where}: what it tells of its task is damaged: {error}") from None
    name = told.task.get("name")
    scaling = None if latents.scale is None else (float(latents.scale), float(latents.shift))
    return Learned(name if isinstance(name, str) else None, told.task, conditions, state, scaling)


def of_folder(folder: Path) -> Learned:
    """Of a folder of diffusers: of an export of ours, or Stable Diffusion's inpainting by model_index.json. Raises
    WeightsError."""
    if (folder / TASK_FACTS).is_file():
        state: dict[str, Tensor] = {}
        for name, renamed in FILES.items():
            if (folder / name).is_file():
                tensors = read_file(folder / name)[0]
                state |= {renamed.get(key, key): tensor.float() for key, tensor in tensors.items()}
        return of_facts(_json(folder / TASK_FACTS), state, folder / TASK_FACTS)
    index = folder / "model_index.json"
    if index.is_file() and _json(index).get("_class_name") == INPAINT:
        return Learned(conditions=Conditions(mask=STABLE_DIFFUSION))
    return Learned()


def of_single_file(
    tensors: Mapping[str, Tensor], stated: Mapping[str, Any], task: TaskConfig, channels: tuple[int, int], where: Path
) -> Learned:
    """Of a file in CompVis' names. task: that takes its weights. channels: of the latent, and of the first convolution,
    by which published inpainting is known. Raises WeightsError."""
    adopted = found(facts_of(task).export).adopt(tensors)
    state = {name: tensor.float() for name, tensor in adopted.items()}
    if "task" in stated:
        return of_facts(stated, state, where)
    mask = BY_CHANNELS.get(channels)
    return Learned(state=state) if mask is None else Learned(conditions=Conditions(mask=mask), state=state)


def refuse_inputs(where: str, learned: Learned, extra: int, task: TaskConfig, ours: int, cache: Conditions) -> str:
    """Raise WeightsError where the weights read other inputs than the run gives after the latent.

    extra, ours: how many channels there are of them there and here. Returns a warning where nothing tells what they
    are, else "".
    """
    if extra <= 0 or not ours:
        return ""
    if learned.name not in (None, task.name):
        raise WeightsError(
            f"{where} reads {extra} input channels of task={learned.name} after the latent's, and this run's are those "
            f"of task={task.name}: begin with weights of the same task, or with some that read the latent alone"
        )
    if extra != ours:
        raise WeightsError(
            f"{where} reads {extra} input channels after the latent's, and task={task.name} gives {ours}: begin with "
            "weights that read as many, or the latent alone"
        )
    theirs, mine = learned.conditions.mask, cache.mask
    if theirs is None or mine is None:
        return "" if learned.name else f"{where} does not say what its {extra} input channels after the latent's are"
    differing = [
        f"{name}: {getattr(theirs, name)} there, {getattr(mine, name)} here"
        for name in COMPARED
        if getattr(theirs, name) != getattr(mine, name)
    ]
    if differing:
        raise WeightsError(
            f"{where} was trained on other inputs of inpainting than this run's cache holds ({'; '.join(differing)}): "
            "encode with the mask.convention of those weights, or begin with others"
        )
    return ""


def misfit(learned: Learned, task: TaskConfig, expected: Mapping[str, Tensor]) -> str:
    """Why the task's own weights cannot be taken over, in words; "" where they fit."""
    if learned.name not in (None, task.name):
        return f"they are of task={learned.name}"
    if not learned.state:
        return "there are none"
    mine = {name: value for name, value in vars(task).items() if name != "drop"}
    for name, value in mine.items():
        theirs = learned.config.get(name, value)
        if theirs != value:
            return f"task.{name} is {theirs} there and {value} here"
    if different := sorted(set(learned.state) ^ set(expected)):
        return f"{different[0]} is in one of the two alone"
    for name, tensor in learned.state.items():
        if tensor.shape != expected[name].shape:
            return f"{name} is {tuple(tensor.shape)} there and {tuple(expected[name].shape)} here"
    return ""


def renamed_classes(learned: Learned, cache: Conditions) -> list[str]:
    """Conditions whose numbers have other names there than in the run's cache."""
    found_names = []
    for name in ("classes", "boxes", "labels"):
        theirs, mine = (getattr(getattr(one, name), "names", ()) for one in (learned.conditions, cache))
        if theirs and mine and theirs != mine:
            found_names.append(name)
    return found_names


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = parse_json(file.read(JSON_BYTES + 1), JSON_BYTES)
    except (OSError, ParseError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} cannot be read: it is not a table")
    return value
