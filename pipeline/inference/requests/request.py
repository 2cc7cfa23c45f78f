"""The interface of requests: what one row of a picture is asked to show, as members of a batch.

The arrays are made by the same functions of pipeline/conditions as those of a cache, so that a model is asked in the
terms in which it was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from pipeline.config import SampleConfig
from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.found import facts_of, found, require_start
from pipeline.data.format.contract import Contract
from pipeline.errors import ConfigError
from pipeline.inference.requests.files import called
from pipeline.inference.requests.given import pasted, read_hole, read_image
from pipeline.models.encoders.first_stage import FirstStage

Pictures = np.ndarray
"""(n, H, W, 3) uint8."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of the picture that `sample` writes.

    label: words under the row. size: (width, height) of its images in pixels. members: arrays of one record by name, as
    a cache stores them, with one variant where it has several, and what the task's `prepare` would draw. shown: (H, W,
    3) uint8, what was given, as the row's first picture. finish: what becomes of the images that are drawn. over: what
    is drawn over them in the picture alone. image: (H, W, 3) uint8, what sampling may begin from. hole: (H, W) uint8, 1
    where sampling makes that image anew and 0 where it keeps it; None for a model that is given the hole itself.
    """

    label: str
    size: tuple[int, int]
    members: Mapping[str, np.ndarray] = field(default_factory=dict)
    shown: np.ndarray | None = None
    finish: Callable[[Pictures], Pictures] | None = None
    over: Callable[[Pictures], Pictures] | None = None
    image: np.ndarray | None = None
    hole: np.ndarray | None = None


class Requests(ABC):
    """The requests of one task. Made without networks, so that what is wrong is refused before they are loaded."""

    needs: tuple[str, ...] = ()
    """Keys that must be given."""
    sized_by = ""
    """The key whose file decides the size of the images; "" = the cache's size, or that of size=."""

    def __init__(self, task: TaskConfig, contract: Contract, stride: int) -> None:
        """stride: factor by which the UNet divides the sides of latents."""
        self.task, self.contract = task, contract
        self.multiple = contract.downsampling * stride
        """Sides of images in pixels are multiples of it."""

    def rows(self, config: SampleConfig) -> list[Request]:
        """The request of every row, without what encoders make of it. Raises ConfigError for keys that the task does
        not take or lacks, for files that cannot be used, and for sizes that the UNet cannot make."""
        self._refuse_keys(config)
        return [self._row(config, row) for row in range(config.rows)]

    @abstractmethod
    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        """The request of one row. words: its prompt, class or files by key. size: (width, height) of its images, if the
        task does not say it itself."""

    def encoded(self, request: Request, first_stage: FirstStage) -> Request:
        """The request with what the autoencoder makes of it."""
        return request

    def require_size(self, size: tuple[int, int], what: str, scale: int = 1) -> None:
        """Raise ConfigError unless the UNet can make images of `size` (width, height), in pixels.

        what: which file has which size, at the start of the message. scale: pixels of the images per pixel of that
        file, along a side.
        """
        if any(side < 1 or side % self.multiple for side in size):
            step = self.multiple // np.gcd(self.multiple, scale)  # of the file's sides
            nearest = " x ".join(str(max(round(side / scale / step), 1) * step) for side in size)
            raise ConfigError(f"{what}: this model makes multiples of {self.multiple} pixels; the nearest is {nearest}")

    def _row(self, config: SampleConfig, row: int) -> Request:
        words = {key: values[row if len(values) > 1 else 0] for key, values in config.asked.items()}
        size = self.contract.latent_shape[2], self.contract.latent_shape[1]
        size = size[0] * self.contract.downsampling, size[1] * self.contract.downsampling
        if config.size:
            size = sides(config.size[row if len(config.size) > 1 else 0])
            self._require_asked(size)
        if "image" in words and self.free_image:
            return self._of_image(words, config.strength)
        return self.request(words, size)

    @property
    def free_image(self) -> bool:
        """Whether image= is no condition of the task, so that any of its models may begin from it or keep a part."""
        return "image" not in facts_of(self.task).asks

    def _of_image(self, words: Mapping[str, str], strength: float | None) -> Request:
        """The request of a row that begins from an image, or keeps a part of it."""
        url, image = words["image"], read_image(words["image"])
        size = image.shape[1], image.shape[0]
        shape = f"{size[0]} x {size[1]}"
        self.require_size(size, f"image={called(url)} has {shape} pixels")
        hole = read_hole(words["mask"], image, url) if "mask" in words else None
        request = self.request(words, size)
        if request.size != size:
            raise ConfigError(
                f"image={called(url)} has {shape} pixels and {self.sized_by}={called(words[self.sized_by])} has "
                f"{request.size[0]} x {request.size[1]}: give an image of that size"
            )
        shown = image if hole is None else pasted(np.full_like(image, GREY)[None], image, hole)[0]
        if request.over is not None:
            shown = request.over(shown[None])[0]
        elif request.shown is not None:
            shown = request.shown
        names = [called(words[key]) for key in ("image", "mask") if key in words]
        names += [] if strength is None else [f"strength {strength:g}"]
        return replace(
            request,
            label=with_words(request.label, ", ".join(names)),
            shown=shown,
            finish=None if hole is None else partial(pasted, image_HWC=image, mask_HW=hole),
            image=image,
            hole=hole,
        )

    def _require_asked(self, size: tuple[int, int]) -> None:
        """As require_size, of what size= says."""
        if any(side % self.multiple for side in size):
            nearest = "x".join(str(max(round(side / self.multiple), 1) * self.multiple) for side in size)
            raise ConfigError(
                f"size={size[0]}x{size[1]}: this model makes multiples of {self.multiple} pixels; the nearest is "
                f"{nearest}"
            )

    def _refuse_keys(self, config: SampleConfig) -> None:
        """Raise ConfigError for keys that the task does not take, and for those that it lacks."""
        taken = [*takes(self.task), *config.guide.asks]
        of_image = ("image", "mask") if self.free_image else ()
        given = {"negative": config.negative, "noise": config.noise}
        for key in [*config.asked, *(key for key, value in given.items() if value)]:
            if key == "prompt" and not any(config.prompt):
                continue
            if key not in (*taken, *of_image):
                by = f"it takes {', '.join(taken)}" if taken else "it is asked for nothing"
                raise ConfigError(f"{key}: a model of task={self.task.name} takes no {key} ({by}): leave {key} out")
        for key in self.needs:
            if key not in config.asked:
                raise ConfigError(f"a model of task={self.task.name} needs {key}: give {key}={EXAMPLES[key]}")
        require_start(self.task, config.strength)
        if config.image and self.free_image and config.strength is None and not config.mask:
            raise ConfigError(
                f"image={called(config.image[0])}: nothing says what becomes of it: give strength=0.6 to begin from "
                "it, or mask=FILE to make the part anew that is white there"
            )
        if config.size and (sized_by := self.sized_by or ("image" if config.image else "")):
            raise ConfigError(
                f"size={','.join(config.size)}: the images have the size that {sized_by}= says: leave size out"
            )


GREY = 128
"""Level with which the part of an image that is made anew is shown."""
EXAMPLES = {
    "class": "3, or a name",
    "boxes": "FILE.json",
    "labels": "FILE.png, a label map",
    "image": "FILE",
    "mask": "FILE, white where the image is made anew",
}
"""What a key that is missing should be given."""


def takes(task: TaskConfig) -> list[str]:
    """Keys by which a model of the task is asked."""
    unknown = {"noise": not task.augmented, "prompt": not task.takes_text, "negative": not task.takes_text}
    return [key for key in facts_of(task).asks if not unknown.get(key)]


def make_requests(task: TaskConfig, contract: Contract, stride: int) -> Requests:
    """The requests of a task. The arguments are those of Requests."""
    requests: type[Requests] = found(facts_of(task).requests)
    return requests(task, contract, stride)


def sides(size: str) -> tuple[int, int]:
    """Width and height of a size such as "512x768"."""
    width, height = size.split("x")
    return int(width), int(height)


def with_words(prompt: str | None, what: str) -> str:
    """The label of a row that was asked by files, and by a caption where there is one."""
    return f"{prompt} ({what})" if prompt else what
