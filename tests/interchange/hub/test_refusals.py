"""`push` against a stand-in for the hub that refuses, fails for now, is silent or is none: one line, and no commit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from made.hub import LARGE, REPO, SMALL, push_files, pushed, refused, serve
from pipeline.errors import ConfigError, DestinationExists, LatentmillError, StorageError
from pipeline.interchange.hub import client
from pipeline.interchange.hub.client import Hub
from pipeline.interchange.hub.push import look
from servers.hub import Fault
from servers.hub import Hub as Server

BY_US = ("GET /api/models/", "repos/create", "revision/[0-9a-f]{40}", "/commit/")
"""Requests that huggingface_hub makes once."""
BY_BOTH = ("validate-yaml", "preupload", "objects/batch", "PUT /lfs", "POST /complete")
"""Requests that it makes six times before it gives up."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serve(monkeypatch)


@pytest.mark.parametrize(
    ("pattern", "status", "times"),
    [
        *((pattern, status, 2) for pattern in BY_US for status in (429, 503, 0)),
        *((pattern, status, 7) for pattern in BY_BOTH for status in (429, 503, 0)),
        ("PUT /lfs", 403, 2),  # the address has run out
    ],
)
def test_what_fails_for_now_is_tried_again(hub: Server, tmp_path: Path, pattern: str, status: int, times: int) -> None:
    hub.faults.append(Fault(pattern, status, times=times))
    pushed(tmp_path, SMALL | LARGE)
    assert hub.faults[0].times == 0
    assert hub.repositories[REPO].history == ["initial commit", "a message"]
    assert set(hub.files(REPO)) == {*SMALL, *LARGE, "SHA256SUMS"}


@pytest.mark.parametrize(
    "pattern", ["GET /api/models/", "repos/create", "revision/[0-9a-f]{40}", "preupload", "PUT /lfs"]
)
def test_a_request_without_an_answer_fails_and_is_made_again(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(client, "SECONDS", 0.5)
    hub.faults.append(Fault(pattern, 0, seconds=10))
    started = time.monotonic()
    pushed(tmp_path, SMALL | LARGE)
    assert hub.faults[0].times == 0 and time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("pattern", "status", "kind", "words"),
    [
        ("GET /api/models/", 401, ConfigError, "does not take the token of HF_TOKEN (why): make another at http"),
        ("repos/create", 403, ConfigError, "may not create someone/model (why): make one with the right to write"),
        ("preupload", 403, ConfigError, "may not write someone/model"),
        ("/commit/", 404, StorageError, "has no such repository, branch or file"),
        ("/commit/", 409, StorageError, "others in the meantime (why): nothing was committed"),
        ("PUT /lfs", 403, StorageError, "the storage of http"),
        ("PUT /lfs", 403, StorageError, "someone/model answers 403 to an upload (why): nothing was committed to"),
        ("PUT /lfs", 413, StorageError, "refuses the request with status 413"),
        ("/commit/", 402, StorageError, "refuses the request with status 402 (why)"),
        ("revision/[0-9a-f]{40}", 503, StorageError, "answers 503 (why): nothing was committed to"),
        ("preupload", 429, StorageError, "answers 429 (why): nothing was committed to"),
        ("GET /api/models/", 0, StorageError, "cannot reach http"),
        ("PUT /lfs", 0, StorageError, "cannot reach http"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    hub: Server, tmp_path: Path, pattern: str, status: int, kind: type[LatentmillError], words: str
) -> None:
    hub.faults.append(Fault(pattern, status, times=99, message="why"))
    assert words in refused(tmp_path, kind)
    assert all(made.history == ["initial commit"] for made in hub.repositories.values())


def test_an_answer_that_is_none_of_a_hub_is_told(hub: Server, tmp_path: Path) -> None:
    hub.faults.append(Fault("GET /api/models/", 200, times=9))
    assert "answers otherwise than the hub" in refused(tmp_path)
    hub.faults[:] = [Fault(r"PUT /lfs/\w+/\d", 200, times=99)]  # a part without its hash
    assert "answers otherwise than the hub (ValueError: Invalid etag" in refused(tmp_path)


def test_a_token_that_may_only_read_is_refused_before_any_work(hub: Server) -> None:
    hub.role = "read"
    with pytest.raises(ConfigError, match=r"the token of HF_TOKEN may only read: make one that may write at http"):
        look(Hub(REPO), public=False)
    hub.role = "fineGrained"
    look(Hub(REPO), public=False)
    hub.faults.append(Fault("whoami", 404, times=9))  # a hub that does not tell
    look(Hub(REPO), public=False)


def test_a_repository_that_was_made_public_during_the_export_is_not_pushed_to(hub: Server, tmp_path: Path) -> None:
    repository, made = Hub(REPO), hub.make(REPO)
    look(repository, public=False)
    made.private = False
    with pytest.raises(ConfigError, match="is public, and public=true is not given"):
        push_files(repository, tmp_path, SMALL | LARGE)
    assert hub.said("^(POST|PUT)") == []


@pytest.mark.parametrize("ignored", ["*.safetensors", "unet/config.json", "SHA256SUMS"])
def test_a_file_that_gitignore_there_leaves_out_is_refused_by_name(hub: Server, tmp_path: Path, ignored: str) -> None:
    hub.make(REPO, files={".gitignore": f"*.tmp\n{ignored}\n".encode()})
    message = refused(tmp_path, ConfigError)
    assert "its .gitignore leaves out" in message and ignored.lstrip("*") in message
    assert hub.repositories[REPO].history == ["initial commit"]
    hub.make(REPO, files={".gitignore": b"*.tmp\n"})
    pushed(tmp_path, SMALL | LARGE)
    assert set(hub.files(REPO)) == {*SMALL, *LARGE, "SHA256SUMS"}


def test_a_card_that_is_no_text_is_told_before_anything_is_asked_for(hub: Server, tmp_path: Path) -> None:
    assert "README.md of dest is not UTF-8" in refused(tmp_path, ConfigError, {**LARGE, "README.md": b"\xff\xfe#"})
    assert hub.repositories == {} and hub.said("^(POST|PUT)") == []


def test_what_lies_there_and_is_no_push_names_another_place(hub: Server, tmp_path: Path) -> None:
    hub.make(REPO, files={"SHA256SUMS": b"no hashes\n"})
    assert refused(tmp_path, DestinationExists).endswith("SHA256SUMS is not what a push wrote: choose another push=")


def test_a_hub_that_is_not_there_is_told_before_any_work(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"cannot reach http://127\.0\.0\.1:1 .*the same command goes on"):
        look(Hub(REPO), public=False)


def test_metadata_that_the_hub_refuses_come_before_any_bytes_are_committed(hub: Server, tmp_path: Path) -> None:
    message = refused(tmp_path, ConfigError, {**LARGE, "README.md": b"---\nlicense: none-such\n---\n"})
    assert "refuses the metadata of README.md" in message and "must be one of mit, apache-2.0" in message
    assert hub.repositories[REPO].history == ["initial commit"]
    assert hub.said("^PUT") == []
