"""Published UNet weights, and what their files tell about how they were trained.

    diffusers   a folder: unet/ with config.json and safetensors, and scheduler/, vae/ and text_encoder/ beside it;
                or only the unet folder
    compvis     one .safetensors, .ckpt or .pt file with `model.diffusion_model.*`, as Stable Diffusion was released

Only tensors are read: a pickle that holds anything else is refused, since it could run code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ModelConfig, TaskConfig
from pipeline.config.check.groups import check_model
from pipeline.config.values.bounds import Gt
from pipeline.errors import ConfigError, ParseError, WeightsError
from pipeline.interchange import unet as convert
from pipeline.interchange.class_table import refuse_table
from pipeline.interchange.learned import Learned, of_folder, of_single_file
from pipeline.interchange.noise_levels import Levels, of_file, of_scheduler
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.weights import read_file
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.planning.dimensions import depths_of, heads_of

T = TypeVar("T")
FILE = re.compile(
    r"diffusion_pytorch_model(?!.*-\d+-of-\d+)(\.(?P<variant>[\w-]{1,40}))?\.(?P<format>safetensors|bin)"
    r"(?P<shards>\.index(\.(?P<shard_variant>[\w-]{1,40}))?\.json)?"
)
"""Files in which diffusers saves a model's weights, whole or in shards: diffusion_pytorch_model.fp16.safetensors."""
RAW = "non_ema"
"""The variant that holds raw weights where the file without a variant holds an average."""
JSON_BYTES = 64 << 20
MOST_LEVELS = 16
NO_MATTER = ("sample_size", "dropout", "upcast_attention")
"""Arguments of diffusers' UNets that do not affect the weights or the output."""
INPUT = {"diffusers": "conv_in.weight", "compvis": f"{convert.COMPVIS_PREFIX}input_blocks.0.0.weight"}
"""The first convolution, whose input channels a task may add to."""


@dataclass(frozen=True)
class Pretrained:
    """A UNet's weights, float32, under our names. Other fields are None when the files do not tell."""

    state: dict[str, Tensor]
    prediction: str | None = None
    """As DiffusionConfig.prediction, or diffusers' name where we have none."""
    scale: float | None = None
    """Of the latents, as `shift` is: a latent is (z - shift) * scale."""
    shift: float | None = None
    text_width: int | None = None
    """Width of the states of the text encoder in the same folder."""
    levels: Levels | None = None
    """The noise levels that it was trained at."""
    learned: Learned = Learned()  # noqa: RUF009  (frozen)
    """What is known of its task."""


@dataclass(frozen=True)
class _Vae:
    """What is read of an autoencoder's config.json."""

    scaling_factor: Annotated[float, Gt(0)] = 0.18215
    shift_factor: float | None = None


@dataclass(frozen=True)
class _Text:
    """What is read of a text encoder's config.json."""

    hidden_size: Annotated[int, Gt(0)] | None = None


@dataclass(frozen=True)
class _Facts:
    """What our own single files state besides the process."""

    scale: Annotated[float, Gt(0)] | None = None
    shift: float | None = None
    model: dict[str, Any] | None = None


def load_diffusers(folder: Path, config: ModelConfig, which: str = "ema") -> Pretrained:
    """The UNet of a diffusers folder. config: of the UNet that takes the weights, without its extra input channels.
    which: "raw" takes the variant non_ema where the folder has it.

    Raises WeightsError for another architecture, and for files that are missing or damaged."""
    unet = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    facts = _json(unet / "config.json")
    tensors = _weights_of(unet, which)
    refuse_table(f"{unet}", tensors, "diffusers")
    config = _with_input_channels_of(config, tensors, INPUT["diffusers"])
    require_same_class(f"{unet / 'config.json'}", facts, config)
    state = _converted(unet, lambda: convert.from_diffusers(tensors, config))
    model_folder = unet.parent if unet.name == "unet" else unet
    scheduler, vae, text = (
        path if path.is_file() else None
        for path in (
            model_folder / "scheduler" / "scheduler_config.json",
            model_folder / "vae" / "config.json",
            model_folder / "text_encoder" / "config.json",
        )
    )
    prediction, levels = (None, None) if scheduler is None else of_scheduler(_json(scheduler), scheduler)
    encoder, learned = None if vae is None else _typed(_Vae, _json(vae), vae), of_folder(model_folder)
    scaling = None if encoder is None else (float(encoder.scaling_factor), float(encoder.shift_factor or 0.0))
    scale, shift = learned.scaling or scaling or (None, None)
    return Pretrained(
        state,
        prediction=prediction,
        scale=scale,
        shift=shift,
        text_width=None if text is None else _typed(_Text, _json(text), text).hidden_size,
        levels=levels,
        learned=learned,
    )


def load_compvis(path: Path, config: ModelConfig, which: str = "ema", task: TaskConfig | None = None) -> Pretrained:
    """The UNet of a CompVis checkpoint. which: "ema" takes the averaged weights where the file holds both kinds. task:
    that may take its own weights from it.

    Such files do not tell the number of heads, and only some, such as ours, tell how they were trained. Raises
    WeightsError as load_diffusers does."""
    tensors, stated = read_file(path)
    prefix = convert.COMPVIS_PREFIX
    unet_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not unet_tensors:
        raise WeightsError(
            f"{path} holds no {prefix}*: it is no checkpoint in CompVis' layout. Of diffusers' files give the folder"
        )
    if which == "ema":  # CompVis' averages have no dots in their names
        averages = {name: tensors.get(f"model_ema.{name.partition('.')[2].replace('.', '')}") for name in unet_tensors}
        if all(average is not None for average in averages.values()):
            unet_tensors = {name: average for name, average in averages.items() if average is not None}
    refuse_table(f"{path}", unet_tensors, "compvis")
    config = _with_input_channels_of(config, unet_tensors, INPUT["compvis"])
    facts = _typed(_Facts, stated, path)
    if facts.model is not None:
        require_same_architecture(str(path), _model(path, facts.model), config)
    scale, shift = facts.scale, facts.shift
    if scale is None and "scale_factor" in tensors:
        scale, shift = _scale(path, tensors["scale_factor"]), 0.0
    prediction, levels = of_file(tensors, stated, path)
    state = _converted(path, lambda: convert.from_compvis(unet_tensors, config))
    channels = (config.out_channels, state["conv_in.weight"].shape[1])
    learned = Learned() if task is None else of_single_file(tensors, stated, task, channels, path)
    return Pretrained(state, prediction, scale, shift, levels=levels, learned=learned)


def widened(state: Mapping[str, Tensor], config: ModelConfig, name: str = "conv_in.weight") -> dict[str, Tensor]:
    """The weights with zeros for the input channels that config adds: the network computes the same until it learns to
    read them."""
    extra = config.in_channels - state[name].shape[1]
    return {**state, name: F.pad(state[name], (0, 0, 0, 0, 0, max(extra, 0)))}


# --------------------------------------------------------------------------------------------------------------------
# Is it the same network?


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The facts that determine the network, in one normal form, without the input channels."""
    levels = range(len(config.multipliers))
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    attends = [2**level in config.attention for level in levels]
    has_heads = [
        has_attention or level == levels[-1] for level, has_attention in zip(levels, attends, strict=True)
    ]  # the middle block always attends
    depths = depths_of(config)
    return {
        "widths": widths,
        "blocks": config.blocks,
        "attends": attends,
        "heads": [
            heads_of(config, width) if has_attention else 0
            for width, has_attention in zip(widths, has_heads, strict=True)
        ],
        "transformer_depth": [
            depth if has_attention and config.context_width else 0
            for depth, has_attention in zip(depths, has_heads, strict=True)
        ],
        "context_width": config.context_width,
        "vector_width": config.vector_width,
        "vector_time_ids": config.vector_time_ids,
        "norm_groups": config.norm_groups,
        "resblock_updown": config.resblock_updown,
        "scale_shift_norm": config.scale_shift_norm,
        "out_channels": config.out_channels,
    }


def require_same_architecture(where: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises WeightsError, naming every difference."""
    their_facts, our_facts = architecture(theirs), architecture(ours)
    differing = [
        f"{name}: {their_facts[name]} there, {our_facts[name]} here"
        for name in our_facts
        if their_facts[name] != our_facts[name]
    ]
    if differing:
        raise WeightsError(f"{where} holds another architecture than model={ours.name} ({'; '.join(differing)})")


def require_same_class(where: str, theirs: Mapping[str, Any], ours: ModelConfig) -> None:
    """Compare a config.json of diffusers with the one that our UNet would have. Raises WeightsError for a difference.

    Keys that the file lacks have their class's default. Entries of levels without attention are not compared."""
    declare_torchvision_ops()
    import diffusers

    name = convert.diffusers_class(ours)
    if theirs.get("_class_name", name) != name:
        raise WeightsError(
            f"{where}: a {str(theirs.get('_class_name'))[:100]}; model={ours.name} is a {name} in diffusers"
        )
    try:
        expected = convert.diffusers_config(ours)
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from None
    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: facts.default for key, facts in arguments.items() if key not in ("self", "kwargs")}
    differing = []
    for key, default in defaults.items():
        stored, expected_value = (_by_level(key, config.get(key, default), ours) for config in (theirs, expected))
        if stored != expected_value and key not in NO_MATTER:
            differing.append(f"{key}: {str(stored)[:100]} there, {expected_value} here")
    if differing:
        raise WeightsError(f"{where}: another architecture than model={ours.name} ({'; '.join(differing[:5])})")


def _by_level(key: str, value: Any, config: ModelConfig) -> Any:
    """A value in normal form: one number per level, whether the file holds one for all levels or one for each."""
    value = list(value) if isinstance(value, tuple | list) else value
    if key not in ("attention_head_dim", "transformer_layers_per_block", "layers_per_block", "only_cross_attention"):
        return value
    levels = len(config.multipliers)
    values = value if isinstance(value, list) else [value] * levels
    if not config.context_width or len(values) != levels or key in ("layers_per_block", "only_cross_attention"):
        return values
    return [
        number if 2**level in config.attention or level == levels - 1 else None for level, number in enumerate(values)
    ]


# --------------------------------------------------------------------------------------------------------------------
# Files


def _weights_of(folder: Path, which: str = "ema") -> dict[str, Tensor]:
    """The tensors of a diffusers model's folder, from one file or from shards."""
    path = _weights_file(folder, which)
    if path.suffix != ".json":
        return read_file(path)[0]
    names = _json(path).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise WeightsError(f"{path} lists no files beside it (weight_map): take the folder anew from where it came")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        tensors |= read_file(folder / name)[0]
    return tensors


def _weights_file(folder: Path, which: str) -> Path:
    """The file with the weights of a diffusers model's folder, or the index of its shards. Preferred are safetensors,
    full precision and one file, in this order."""
    found = {}
    try:
        names = [path for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise WeightsError(f"{folder} cannot be listed: {error.strerror}") from None
    for path in names:
        if (match := FILE.fullmatch(path.name)) is not None:
            variant = match["variant"] or match["shard_variant"] or ""
            asked = variant == RAW if which == "raw" else variant != RAW
            found[not asked, match["format"] != "safetensors", variant != "", variant, path.suffix == ".json"] = path
    if not found:
        raise WeightsError(f"{folder} has no weights: diffusion_pytorch_model.safetensors is wanted")
    return found[min(found)]


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = parse_json(file.read(JSON_BYTES + 1), JSON_BYTES)
        if not isinstance(value, dict):
            raise ParseError("it is not a table")
        return value
    except (OSError, ParseError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None


def _typed(cls: type[T], value: Any, where: Path) -> T:
    try:
        return build(cls, value, unknown="pass")
    except ParseError as error:
        raise WeightsError(f"{where}: {error}") from None


def _model(where: Path, facts: dict[str, Any]) -> ModelConfig:
    """The network that our own file says it holds."""
    try:
        model = build(ModelConfig, facts)
        if len(model.multipliers) > MOST_LEVELS:
            raise ParseError(f"multipliers: {len(model.multipliers)} levels")
        check_model(model)
    except (ParseError, ConfigError) as error:
        raise WeightsError(f"{where}: its metadata name no network of ours: {error}") from None
    return model


def _scale(where: Path, tensor: Tensor) -> float:
    """CompVis' scale_factor."""
    scale = float(tensor) if tensor.numel() == 1 and tensor.is_floating_point() else 0.0
    if not 0 < scale < float("inf"):
        raise WeightsError(f"{where}: scale_factor is no scale of latents")
    return scale


def _with_input_channels_of(config: ModelConfig, tensors: Mapping[str, Tensor], name: str) -> ModelConfig:
    """config with the checkpoint's number of input channels where that is smaller."""
    weight = tensors.get(name)
    channels = config.in_channels if weight is None or weight.ndim != 4 else weight.shape[1]
    return replace(config, in_channels=min(channels, config.in_channels))


def _converted(where: Path, convert_tensors: Any) -> dict[str, Tensor]:
    """The converted weights in float32. An error names the file."""
    try:
        return {name: tensor.float() for name, tensor in convert_tensors().items()}
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from None
