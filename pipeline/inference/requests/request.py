"""The interface of requests: what one row of a picture is asked to show, as members of a batch.

The arrays are made by the same functions of pipeline/conditions as those of a cache, so that a model is asked in the
terms in which it was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.config import SampleConfig
from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.found import facts_of, found
from pipeline.data.format.contract import Contract
from pipeline.errors import ConfigError
from pipeline.models.encoders.first_stage import FirstStage

Pictures = np.ndarray
"""(n, H, W, 3) uint8."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of the picture that `sample` writes.

    label: words under the row. size: (width, height) of its images in pixels. members: arrays of one record by name, as
    a cache stores them, with one variant where it has several, and what the task's `prepare` would draw. shown: (H, W,
    3) uint8, what was given, as the row's first picture. finish: what becomes of the images that are drawn. over: what
    is drawn over them in the picture alone.
    """

    label: str
    size: tuple[int, int]
    members: Mapping[str, np.ndarray] = field(default_factory=dict)
    shown: np.ndarray | None = None
    finish: Callable[[Pictures], Pictures] | None = None
    over: Callable[[Pictures], Pictures] | None = None


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
        return self.request(words, size)

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
        given = {"negative": config.negative, "noise": config.noise}
        for key in [*config.asked, *(key for key, value in given.items() if value)]:
            if key == "prompt" and not any(config.prompt):
                continue
            if key not in taken:
                by = f"it takes {', '.join(taken)}" if taken else "it is asked for nothing"
                raise ConfigError(f"{key}: a model of task={self.task.name} takes no {key} ({by}): leave {key} out")
        for key in self.needs:
            if key not in config.asked:
                raise ConfigError(f"a model of task={self.task.name} needs {key}: give {key}={EXAMPLES[key]}")
        if config.size and self.sized_by:
            raise ConfigError(
                f"size={','.join(config.size)}: the images have the size that {self.sized_by}= says: leave size out"
            )


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
