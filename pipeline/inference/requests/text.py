"""Requests of text-to-image: captions."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.inference.requests.request import Request, Requests


class TextRequests(Requests):
    """A caption for each row; captions.py encodes them."""

    def request(self, words: Mapping[str, str], size: tuple[int, int]) -> Request:
        return Request(label=words.get("prompt", ""), size=size)


REQUESTS = TextRequests
