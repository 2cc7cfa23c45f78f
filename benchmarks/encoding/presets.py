"""What `benchmarks.encode` measures: encoders, source images, resolution and batch, under a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

from pipeline.config import EncodersConfig
from pipeline.errors import OverrideError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One measurement. Every field but `name` and `encoders` can be given as key=value.

    Shards are multiples of the batch, so that no batch of the stage is padded.
    """

    name: str
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    width: int = 512
    """Of the source images, in pixels."""
    height: int = 384
    """Of the source images, in pixels."""
    distinct: int = 384
    """Source images that differ; they are repeated, under keys and captions of their own, up to `images`."""
    images: int = 1536
    """Source images in all: what the stage without encoders goes through in a round."""
    shard: int = 512
    """Images of an input tar."""
    limit_images: int = 1536
    """Of them, those that the bare encoders encode in a round."""
    stage_images: int = 1536
    """Of them, those that the stage encodes in a round, in whole tars."""
    script_images: int = 1536
    """Of them, those that the script encodes in a round, in whole tars; with several processes, as many times more."""
    resolution: int = 64
    """Side of the crops in pixels."""
    batch: int = 64
    """Images of an encoder batch."""
    rounds: int = 3
    """Rounds of (limit, stage, script, decode)."""
    seconds: int = 0
    """No round is begun that would end later than this many seconds after the start, but for the first; 0 = any."""
    threads: int = 0
    """PyTorch's CPU threads, for all of them; 0 = cores."""
    workers: int = 0
    """Decoding workers of the stage; 0 = cores."""
    script_workers: int = 0
    """Also run the script with this many processes of a DataLoader; 0 = do not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    folder: str = ""
    """Where the source images are kept and found again; "" = a temporary folder."""


# Random weights: they are as fast as trained ones, and need no network.
SD1 = EncodersConfig(name="sd1", vae="stabilityai/sd-vae-ft-mse", text="ViT-L-14", text_length=77, seed=1)
SD1_BF16 = replace(SD1, vae_dtype="bfloat16")
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(name="demo"),
        Preset(
            name="sd-vae-256",
            encoders=SD1,
            distinct=96,
            images=384,
            shard=24,
            limit_images=16,
            stage_images=24,
            script_images=24,
            resolution=256,
            batch=4,
        ),
        Preset(
            name="sd1-256",
            encoders=SD1_BF16,
            width=1024,
            height=768,
            distinct=512,
            images=8192,
            shard=256,
            limit_images=2048,
            stage_images=8192,
            script_images=256,
            resolution=256,
            batch=32,
            script_workers=8,
        ),
        Preset(
            name="sd1-512",
            encoders=SD1_BF16,
            width=1024,
            height=768,
            distinct=512,
            images=4096,
            shard=256,
            limit_images=1024,
            stage_images=4096,
            script_images=256,
            resolution=512,
            batch=32,
            script_workers=8,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class MemoryPreset:
    """`memory`: whether memory stays flat over many samples."""

    name: str = "memory"
    samples: int = 200_000
    """Images of 64x64 pixels."""
    shard: int = 10_000
    """Images of an input tar."""
    encoders: Literal["none", "demo"] = "none"
    """none: the encoders are replaced by zeros of the shapes that the demo encoders give; demo: those themselves."""
    every: float = 0.5
    """Seconds between two looks at the processes' memory."""
    flat_mb: float = 64.0
    """Flat: memory after the first tenth of the time is at most this many MB above its peak in the first tenth."""
    workers: int = 0
    """Decoding workers; 0 = cores."""
    folder: str = ""
    """Where the source images are kept and found again; "" = a temporary folder."""


P = TypeVar("P", bound="DataclassInstance")


def changed(preset: P, overrides: Sequence[str]) -> P:
    """The preset with key=value's. Raises OverrideError."""
    kinds = {name: kind for name, kind in get_type_hints(type(preset)).items() if name not in ("name", "encoders")}
    if isinstance(preset, MemoryPreset):
        kinds["encoders"] = get_type_hints(MemoryPreset)["encoders"]
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in kinds:
            raise OverrideError(f"{override}: give KEY=VALUE; the keys are {', '.join(kinds)}")
        choices = get_args(kinds[key])
        if choices and value not in choices:
            raise OverrideError(f"{override}: choose one of {', '.join(choices)}")
        try:
            values[key] = value if choices else kinds[key](value)
        except ValueError:
            raise OverrideError(f"{override}: {key} is a number") from None
    return replace(preset, **values)
