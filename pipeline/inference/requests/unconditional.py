"""Requests of a model that is asked for nothing."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.inference.requests.request import Request, Requests


class UnconditionalRequests(Requests):
    """One row of images."""

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        return Request(label="", size=size)


REQUESTS = UnconditionalRequests
