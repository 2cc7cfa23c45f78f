"""Requests of super-resolution: small images, of which the model makes images larger by the cache's factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipeline.config import SampleConfig, SuperresTask
from pipeline.errors import ConfigError
from pipeline.inference.requests.files import called, read_file, read_rgb
from pipeline.inference.requests.request import Request, Requests, with_words
from pipeline.inference.shown import enlarged
from pipeline.models.tasks.superres import LEVEL


class SuperresRequests(Requests):
    """A small image for each row, in its own 8 bits: nothing is made of it but the shape. It is shown enlarged."""

    needs = ("image",)
    sized_by = "image"

    def rows(self, config: SampleConfig) -> list[Request]:
        rows, task = super().rows(config), self.task
        assert isinstance(task, SuperresTask), task
        if config.noise > task.noise:
            raise ConfigError(f"noise={config.noise}: the model was trained with levels up to task.noise={task.noise}")
        if not config.noise:
            return rows
        level = np.array(config.noise)
        return [
            replace(row, label=f"{row.label}, noise {level}", members={**row.members, LEVEL: level}) for row in rows
        ]

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        facts = self.contract.conditions.lowres
        assert facts is not None, "a run of this task was trained on a cache with small images"
        url = words["image"]
        small = read_rgb("image", url, read_file("image", url))
        height, width = small.shape[:2]
        size = (width * facts.factor, height * facts.factor)
        self.require_size(
            size,
            f"image={called(url)} has {width} x {height} pixels, of which the model makes {size[0]} x {size[1]}",
            facts.factor,
        )
        return Request(
            label=with_words(words.get("prompt"), f"{called(url)}, {facts.factor} times larger"),
            size=size,
            members={"cond.lowres": np.ascontiguousarray(small.transpose(2, 0, 1))},
            shown=enlarged(small, size),
        )


REQUESTS = SuperresRequests
