"""Requests of a class-conditional model: classes by number or name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.conditions.classes import class_of
from pipeline.conditions.facts import ClassFacts
from pipeline.inference.requests.request import Request, Requests


class ClassRequests(Requests):
    """A class for each row."""

    needs = ("class",)

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        facts = self.contract.conditions.classes
        assert facts is not None, "a run of this task was trained on a cache with classes"
        number = class_of(words["class"], facts)
        return Request(label=named(number, facts), size=size, members={"cond.class": np.asarray(number, np.int32)})


def named(number: int, facts: ClassFacts) -> str:
    """A class in words: its name and number, where it has a name."""
    return f"{facts.names[number]} ({number})" if number < len(facts.names) else f"class {number}"


REQUESTS = ClassRequests
