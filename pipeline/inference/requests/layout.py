"""Requests of a layout: files of boxes with classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pipeline.conditions.boxes import boxes_of_file
from pipeline.inference.requests.files import called, read_file
from pipeline.inference.requests.request import Request, Requests, with_words
from pipeline.inference.shown import blank, outlined


class LayoutRequests(Requests):
    """A file of boxes for each row. It is shown as outlines on paper."""

    needs = ("boxes",)

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        facts = self.contract.conditions.boxes
        assert facts is not None, "a run of this task was trained on a cache with boxes"
        url = words["boxes"]
        boxes = boxes_of_file(read_file("boxes", url), facts, f"boxes={called(url)}")
        numbers = [int(number) for number in boxes[:, 0] if number >= 0]
        names = [facts.names[number] if number < len(facts.names) else f"class {number}" for number in numbers]
        return Request(
            label=with_words(words.get("prompt"), ", ".join(names) or "no box"),
            size=size,
            members={"cond.boxes": boxes},
            shown=outlined(blank(size)[None], boxes, facts.names)[0],
            over=partial(outlined, boxes_N5=boxes, names=facts.names),
        )


REQUESTS = LayoutRequests
