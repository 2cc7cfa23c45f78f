"""Requests of semantic synthesis: label maps, whose size the images have."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.conditions.labels import labels_of_file
from pipeline.inference.requests.files import called, picture_size, read_file
from pipeline.inference.requests.request import Request, Requests
from pipeline.inference.shown import coloured


class SemanticRequests(Requests):
    """A label map for each row. It is shown in colours, as the model sees it."""

    needs = ("labels",)
    sized_by = "labels"

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        facts, factor = self.contract.conditions.labels, self.contract.downsampling
        assert facts is not None, "a run of this task was trained on a cache with label maps"
        url = words["labels"]
        data = read_file("labels", url)
        width, height = picture_size("labels", url, data)
        self.require_size((width, height), f"labels={called(url)} has {width} x {height} pixels")
        labels = labels_of_file(data, facts, (height // factor, width // factor), f"labels={called(url)}")
        return Request(
            label=called(url),
            size=(width, height),
            members={"cond.labels": labels},
            shown=coloured(labels, (width, height), facts.names),
        )


REQUESTS = SemanticRequests
