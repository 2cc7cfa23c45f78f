"""The tasks' own keys: a dataclass for each (conf/task/*.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pipeline.config.tasks.base import Cache, TaskConfig
from pipeline.config.values.bounds import Between, Ge
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextTask(TaskConfig):
    """Captions, by cross-attention."""

    name: Literal["text"] = "text"
    """text: captions, by cross-attention."""
    drop: Annotated[float, Between(0, 1)] = 0.1
    """Probability that training replaces a sample's caption with the empty one, as classifier-free guidance needs (Ho &
    Salimans)."""
    encoder: Literal["cached", "transformer"] = "cached"
    """cached: the states of the text tower that made the cache. transformer: a transformer over the caption's token
    ids, trained with the UNet (Rombach et al. 2021, section 4.3.1); the cache has text_storage=tokens."""
    depth: Annotated[int, Ge(1)] = 32
    """Blocks of that transformer."""
    heads: Annotated[int, Ge(1)] = 8
    """Attention heads of each block."""
    head_width: Annotated[int, Ge(1)] = 64
    """Channels of each head."""

    @property
    def members(self) -> tuple[str, ...]:
        return ("text",) if self.encoder == "cached" else ("tokens",)

    @property
    def makes_context(self) -> bool:
        return True

    def lacking(self, cache: Cache) -> list[str]:
        text = cache.text
        if self.encoder == "transformer" and (text is None or not text.vocabulary):
            return ["does not know its text tower's vocabulary: encode it with text_storage=tokens"]
        return []


@dataclass(frozen=True, kw_only=True)
class UnconditionalTask(TaskConfig):
    """No conditioning at all."""

    name: Literal["unconditional"] = "unconditional"
    """unconditional: nothing."""


@dataclass(frozen=True, kw_only=True)
class ClassTask(TaskConfig):
    """A class of the whole image."""

    name: Literal["class"] = "class"
    """class: one class of the whole image."""
    drop: Annotated[float, Between(0, 1)] = 0.1
    """Probability that training replaces a sample's class with the null class, as classifier-free guidance needs."""
    mode: Literal["token", "vector"] = "token"
    """token: a context of one learned token (Rombach et al. 2021). vector: a learned vector beside the timestep, for a
    model with model.vector_width and without cross-attention; it costs less, and diffusers' UNet2DModel holds it."""

    members = ("cond.class",)
    conditions = ("class",)

    @property
    def makes_context(self) -> bool:
        return self.mode == "token"

    @property
    def makes_vector(self) -> bool:
        return self.mode == "vector"

    def tokens(self, cache: Cache) -> int:
        return 1 if self.makes_context else 0


@dataclass(frozen=True, kw_only=True)
class CaptionedTask(TaskConfig):
    """A task with a condition of its own, which may read captions beside it. They are then a context, and they alone
    are dropped."""

    text: bool = False
    """Read captions too, as Stable Diffusion's inpainting and upscaling do; they alone are dropped. In layout their
    states follow the boxes' tokens."""

    own: ClassVar[tuple[str, ...]] = ()  # arrays of its own condition

    @property
    def members(self) -> tuple[str, ...]:
        return (*self.own, *(("text",) if self.text else ()))

    @property
    def droppable(self) -> bool:
        return self.text

    @property
    def makes_context(self) -> bool:
        return self.text


@dataclass(frozen=True, kw_only=True)
class LayoutTask(CaptionedTask):
    """Boxes with classes, as a set of tokens."""

    name: Literal["layout"] = "layout"
    """layout: boxes with classes."""
    drop: Annotated[float, Between(0, 1)] = 0.1
    """Probability that training replaces a sample's boxes by none (with text: its caption by the empty one, and the
    boxes stay), as classifier-free guidance needs."""
    encoder: Literal["mlp", "transformer"] = "mlp"
    """What makes a token of each box. mlp: the box alone. transformer: self-attention over all boxes after it, as in
    Rombach et al. 2021, without order."""
    depth: Annotated[int, Ge(1)] = 2
    """Blocks of the transformer."""
    heads: Annotated[int, Ge(1)] = 8
    """Attention heads of each block."""
    head_width: Annotated[int, Ge(1)] = 64
    """Channels of each head."""
    coordinates: bool = True
    """Concatenate two planes with the coordinates of each latent position, -1 to 1."""
    paint: Annotated[int, Ge(0)] = 0
    """Channels of a picture of the boxes that is concatenated: a learned vector of each box's class times the share of
    the position that it covers; 0 = none."""

    own = ("cond.boxes",)
    conditions = ("boxes",)
    droppable = True
    makes_context = True

    def channels(self, cache: Cache) -> int:
        return 2 * self.coordinates + self.paint

    def tokens(self, cache: Cache) -> int:
        boxes = cache.conditions.boxes
        return super().tokens(cache) + (1 + boxes.most if boxes is not None else 0)


@dataclass(frozen=True, kw_only=True)
class SemanticTask(TaskConfig):
    """A label map, concatenated to the latent."""

    name: Literal["semantic"] = "semantic"
    """semantic: a label map."""
    drop: Annotated[float, Between(0, 1)] = 0.1
    """Probability that training replaces a sample's label map by one without labels, as classifier-free guidance
    needs."""
    labels: Literal["shuffle", "average"] = "shuffle"
    """How the cells of a latent position become channels. shuffle: all of them, side by side. average: their mean, as
    in Rombach et al. 2021."""
    width: Annotated[int, Ge(1)] = 2
    """Channels of each label's learned vector (Rombach et al. 2021 average 3)."""

    members = ("cond.labels",)
    conditions = ("labels",)

    def channels(self, cache: Cache) -> int:
        labels = cache.conditions.labels
        cells = labels.grid**2 if self.labels == "shuffle" and labels is not None else 1
        return self.width * cells


@dataclass(frozen=True, kw_only=True)
class SuperresTask(CaptionedTask):
    """The image at a lower resolution, concatenated to the latent."""

    name: Literal["superres"] = "superres"
    """superres: the image at a lower resolution."""
    noise: Annotated[int, Between(0, 999)] = 0
    """Largest level, of 1000 with betas from 1e-4 to 2e-2, of the noise that is added to the small image; the model is
    told the level (model.vector_width). Stable Diffusion's upscaler has 350; 0 = none."""

    own = ("cond.lowres",)
    conditions = ("lowres",)

    @property
    def makes_vector(self) -> bool:
        return self.noise > 0

    @property
    def may_begin(self) -> bool:
        return False

    @property
    def augmented(self) -> bool:
        return self.noise > 0

    def channels(self, cache: Cache) -> int:
        lowres = cache.conditions.lowres
        larger = cache.downsampling // lowres.factor if lowres is not None else 1
        return 3 * max(larger, 1) ** 2

    def lacking(self, cache: Cache) -> list[str]:
        lowres, factor = cache.conditions.lowres, cache.downsampling
        if lowres is not None and factor % lowres.factor and lowres.factor % factor:
            return [
                f"reduces images by {lowres.factor}, which neither divides nor is a multiple of its latents' {factor}"
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class InpaintTask(CaptionedTask):
    """A mask and the image without what it hides, concatenated to the latent."""

    name: Literal["inpaint"] = "inpaint"
    """inpaint: a mask, and the image without what it hides."""

    own = ("cond.mask", "cond.masked")
    conditions = ("mask",)

    def channels(self, cache: Cache) -> int:
        return 1 + cache.latent_shape[0]


@dataclass(frozen=True, kw_only=True)
class ClassifierTask(TaskConfig):
    """The class of a noisy latent, in place of a picture (Dhariwal & Nichol 2021, section 4)."""

    name: Literal["classifier"] = "classifier"
    """classifier: a network that draws nothing, but knows the class of a noisy latent, with which a model of the same
    latents is guided. It is the encoder half of the UNet that `model` describes."""
    pool: Literal["attention", "mean"] = "attention"
    """How positions become one vector. attention: their mean attends to them (Dhariwal & Nichol 2021, without embedded
    positions, so that any size of latents will do). mean: their mean."""

    members = ("cond.class",)
    conditions = ("class",)
    draws = False
    droppable = False

    @staticmethod
    def classes(cache: Cache) -> int:
        """Number of classes of a cache. Raises ConfigError where it has none."""
        facts = cache.conditions.classes
        if facts is None:
            raise ConfigError("task=classifier needs a cache with classes: encode it with conditions=[class]")
        return facts.count
