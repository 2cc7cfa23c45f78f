"""A stand-in for the hub, to which this process's huggingface_hub goes, and pushes of small files to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import LatentmillError, StorageError
from pipeline.interchange.hub import client
from pipeline.interchange.hub import push as module
from pipeline.interchange.hub.push import look, push
from servers.hub import PART_BYTES, TOKEN, Hub

REPO = "someone/model"
SMALL = {"README.md": b"---\nlicense: mit\n---\n# Model\n", "unet/config.json": b"{}"}
LARGE = {"unet/weights.safetensors": bytes(range(256)) * 40, "vae/weights.safetensors": b"vae" * PART_BYTES}


def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs it, with the environment that leads there; nothing waits before a further try."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(module, "WAITS", (0.0, 0.0))
        yield hub
    set_client_factory(_http.default_client_factory)


def pushed(folder: Path, files: dict[str, bytes], *, public: bool = False, branch: str = "main") -> None:
    """Look and push, as the verb does."""
    repository = client.Hub(REPO, branch)
    look(repository, public=public)
    push_files(repository, folder, files, public=public)


def push_files(repository: client.Hub, folder: Path, files: dict[str, bytes], *, public: bool = False) -> None:
    """A push of files with these contents."""
    there = {}
    for path, data in files.items():
        there[path] = folder / path.replace("/", "-")
        there[path].write_bytes(data)
    (folder / "staging").mkdir(exist_ok=True)
    push(repository, there, "a message", public=public, folder=folder / "staging")


def refused(folder: Path, kind: type[LatentmillError] = StorageError, files: dict[str, bytes] | None = None) -> str:
    """The message of a push that fails: one line, without the token."""
    with pytest.raises(kind) as caught:
        pushed(folder, SMALL | LARGE if files is None else files)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message and len(message) < 600
    return message
