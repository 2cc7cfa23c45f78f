"""A stand-in for the hub, to which this process's huggingface_hub goes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from servers.hub import TOKEN, Hub


def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs it, with the environment that leads there; nothing waits before a further try."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from pipeline.interchange.hub import push

    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(push, "WAITS", (0.0, 0.0))
        yield hub
