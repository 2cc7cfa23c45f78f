"""The guides of `latentmill sample`: what each row of the picture is led to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.conditions.classes import class_of
from pipeline.conditions.mask import mask_of_file
from pipeline.config import SampleConfig, TrainConfig
from pipeline.config.steering import ASKED
from pipeline.data.format.contract import Contract
from pipeline.diffusion.hooks import Hooks
from pipeline.errors import ConfigError
from pipeline.inference.classifier import load_classifier
from pipeline.inference.requests.captions import warn_of_long
from pipeline.inference.requests.classes import named
from pipeline.inference.requests.files import called, picture_size, read_file, read_rgb
from pipeline.inference.requests.request import Request
from pipeline.inference.steering.guide import Guide, classifier_contract, make_guides, require_clip
from pipeline.inference.steering.image import Target
from pipeline.inference.steering.per_batch import Steering
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower


@dataclass(frozen=True)
class RowGuide:
    """A guide, and what it leads each row to."""

    guide: Guide
    wanted: Sequence[Any]

    @property
    def gradients(self) -> bool:
        """Whether the network must have gradients."""
        return self.guide.reads_network

    def hooks(self, numbers: Sequence[int], rows: Sequence[int], shape: tuple[int, int, int]) -> Hooks:
        """As Steering says."""
        return self.guide.hooks(numbers, [self.wanted[row] for row in rows])


class Guides:
    """The guides that are asked for. Made without networks, so that what is wrong is refused before they are loaded."""

    def __init__(self, config: SampleConfig, run: TrainConfig, contract: Contract) -> None:
        """contract: of the run's cache. Raises ConfigError, RunError, ContractMismatch."""
        self._config, self._guide = config, config.guide
        self._wanted: dict[str, list[Any]] = {}
        self._labels: dict[str, list[str]] = {}
        if "clip" in self._guide.weights:
            require_clip(contract, config.run)
            self._wanted["clip"] = self._labels["clip"] = self._asked("clip")
        if "classifier" in self._guide.weights:
            facts = classifier_contract(self._guide, run.diffusion, contract).conditions.classes
            assert facts is not None, "a classifier without classes"
            classes = [class_of(word, facts) for word in self._asked("classifier")]
            self._wanted["classifier"], self._labels["classifier"] = classes, [named(k, facts) for k in classes]

    def shown(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with what their guides lead to in their labels and, where nothing else is shown, as a picture.
        Raises ConfigError for a target or a mask that does not fit the images."""
        if "image" in self._guide.weights:
            urls = self._asked("image")
            targets = [self._target(url, request.size) for url, request in zip(urls, requests, strict=True)]
            for size in {request.size for request in requests}:
                factors = {target.factor for target, row in zip(targets, requests, strict=True) if row.size == size}
                if len(factors) > 1:
                    raise ConfigError(
                        f"guide.target: images of {size[0]} x {size[1]} are compared with targets of several sizes, "
                        f"{' and '.join(map(str, sorted(factors)))} times smaller: give targets of one size"
                    )
            self._wanted["image"], self._labels["image"] = targets, [f"like {called(url)}" for url in urls]
            requests = [
                request if request.shown is not None else replace(request, shown=target.shown())
                for request, target in zip(requests, targets, strict=True)
            ]
        labels = [
            [of_guide[row] for name in sorted(self._labels) if (of_guide := self._labels[name])]
            for row in range(len(requests))
        ]
        return [
            replace(request, label=", ".join(dict.fromkeys(filter(None, (request.label, *words)))))
            for request, words in zip(requests, labels, strict=True)
        ]

    def steering(self, first_stage: FirstStage, tower: TextTower | None, device: torch.device) -> tuple[Steering, ...]:
        """What makes the hooks of the images of `shown` requests."""
        classifier = None
        if "classifier" in self._wanted:
            classifier = load_classifier(self._guide.run, at=self._guide.at, device=device)
        if "clip" in self._wanted and tower is not None:
            warn_of_long(list(dict.fromkeys(self._wanted["clip"])), tower)
        guides = make_guides(self._guide, first_stage, tower, classifier, self._config.seed, device)
        return tuple(RowGuide(guide, self._wanted[name]) for name, guide in guides.items())

    def _asked(self, name: str) -> list[str]:
        """What a guide is asked for in each row."""
        values = self._config.asked[ASKED[name]]
        return [values[row if len(values) > 1 else 0] for row in range(self._config.rows)]

    def _target(self, url: str, size: tuple[int, int]) -> Target:
        """The target of images of `size` (width, height)."""
        picture = read_rgb("guide.target", url, read_file("guide.target", url))
        height, width = picture.shape[:2]
        factor = size[0] // width
        if not factor or (width * factor, height * factor) != size:
            raise ConfigError(
                f"guide.target={called(url)} has {width} x {height} pixels, of which {size[0]} x {size[1]} is no "
                "multiple by one whole number: give a picture of the images' size, or of it divided by such a number"
            )
        return Target(picture, factor, self._mask((width, height)), self._guide.grey)

    def _mask(self, size: tuple[int, int]) -> np.ndarray | None:
        """The mask of a target of `size` (width, height)."""
        return read_mask(self._guide.mask, size)[0] if self._guide.mask else None


def read_mask(url: str, size: tuple[int, int]) -> tuple[np.ndarray, bytes]:
    """guide.mask= of a target of `size` (width, height): (h, w) uint8 of 0 and 1, and the file's bytes. Raises
    ConfigError for one of another size, and one in which nothing counts."""
    data = read_file("guide.mask", url)
    found = picture_size("guide.mask", url, data)
    if found != size:
        raise ConfigError(
            f"guide.mask={called(url)} has {found[0]} x {found[1]} pixels and the target {size[0]} x {size[1]}: give a "
            "mask of the target's size"
        )
    mask = mask_of_file(data, f"guide.mask={called(url)}")
    if not mask.any():
        raise ConfigError(f"guide.mask={called(url)} is black, so that nothing would count: it is white where it does")
    return mask, data
