"""`push` against a stand-in for the hub: one commit or none, what is others' stays, and errors of one line."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from made.hub import serve
from pipeline.errors import ConfigError, DestinationExists, LatentmillError, StorageError
from pipeline.interchange.hub.client import Hub
from pipeline.interchange.hub.push import look, push
from servers.hub import PART_BYTES, TOKEN, Fault
from servers.hub import Hub as Server

REPO = "someone/model"
SMALL = {"README.md": b"---\nlicense: mit\n---\n# Model\n", "unet/config.json": b"{}"}
LARGE = {"unet/weights.safetensors": bytes(range(256)) * 40, "vae/weights.safetensors": b"vae" * PART_BYTES}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serve(monkeypatch)


def pushed(folder: Path, files: dict[str, bytes], *, public: bool = False, branch: str = "main") -> None:
    """Look and push, as the verb does."""
    there = {}
    for path, data in files.items():
        there[path] = folder / path.replace("/", "-")
        there[path].write_bytes(data)
    (folder / "staging").mkdir(exist_ok=True)
    repository = Hub(REPO, branch)
    look(repository, public=public)
    push(repository, there, "a message", public=public, folder=folder / "staging")


def refused(folder: Path, kind: type[LatentmillError] = StorageError, files: dict[str, bytes] | None = None) -> str:
    """The message of a push that fails: one line, without the token."""
    with pytest.raises(kind) as caught:
        pushed(folder, SMALL | LARGE if files is None else files)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message and len(message) < 600
    return message


# --------------------------------------------------------------------------------------------------------------------
# What is there afterwards


def test_all_files_come_in_one_commit_into_a_private_repository(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed(tmp_path, SMALL | LARGE)
    made = hub.repositories[REPO]
    assert (made.private, made.history) == (True, ["initial commit", "a message"])
    files = hub.files(REPO)
    sums = files.pop("SHA256SUMS")
    assert files == SMALL | LARGE
    (tmp_path / "copy").mkdir()
    for path, data in files.items():
        (tmp_path / "copy" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(data)
    subprocess.run(["sha256sum", "--check", "--quiet", "-"], cwd=tmp_path / "copy", input=sums, check=True)
    assert len(hub.said("^PUT /lfs/[0-9a-f]+/")) == -(-len(LARGE["vae/weights.safetensors"]) // PART_BYTES) > 1
    said = capsys.readouterr().out
    assert f"{hub.url}/{REPO} (private), revision main: commit " in said and "5 of 5 files changed" in said


def test_the_same_push_again_makes_no_commit_and_says_so(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed(tmp_path, SMALL | LARGE)
    capsys.readouterr()
    hub.requests.clear()
    pushed(tmp_path, SMALL | LARGE)
    assert hub.repositories[REPO].history == ["initial commit", "a message"]
    assert "nothing changed" in capsys.readouterr().out
    assert hub.said("^(PUT|POST)") == []


def test_a_later_push_sends_what_changed_and_removes_what_it_lacks(hub: Server, tmp_path: Path) -> None:
    pushed(tmp_path, SMALL | LARGE)
    hub.repositories[REPO].branches["main"][1]["samples.png"] = b"of somebody"
    hub.requests.clear()
    pushed(tmp_path, {**SMALL, "unet/config.json": b"{1}", "unet/weights.safetensors": b"other" * 2000})
    files = hub.files(REPO)
    assert files["unet/config.json"] == b"{1}" and files["samples.png"] == b"of somebody"
    assert "vae/weights.safetensors" not in files and files["unet/weights.safetensors"] == b"other" * 2000
    assert len(hub.said("^PUT")) == 1


def test_what_others_changed_there_is_refused_and_their_card_stays(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed(tmp_path, SMALL | LARGE)
    files = hub.repositories[REPO].branches["main"][1]
    files["README.md"] = b"edited there"
    pushed(tmp_path, {**SMALL, "README.md": b"a new card"} | LARGE)
    assert hub.files(REPO)["README.md"] == b"edited there"
    assert "README.md was changed there, so it stays" in capsys.readouterr().err
    pushed(tmp_path, {**SMALL, "README.md": b"a newer card"} | LARGE)
    assert hub.files(REPO)["README.md"] == b"edited there"
    files = hub.repositories[REPO].branches["main"][1]
    files["unet/config.json"] = b"{theirs}"
    assert "unet/config.json is not as a push left it" in refused(tmp_path, DestinationExists)
    assert hub.files(REPO)["unet/config.json"] == b"{theirs}"


def test_a_repository_of_something_else_is_refused_and_an_empty_one_taken(hub: Server, tmp_path: Path) -> None:
    hub.make(REPO, files={"pytorch_model.bin": b"theirs"})
    assert "holds pytorch_model.bin and no earlier push" in refused(tmp_path, DestinationExists)
    assert hub.repositories[REPO].history == ["initial commit"]
    hub.make(REPO, files={"LICENSE": b"theirs"})
    pushed(tmp_path, SMALL)
    assert set(hub.files(REPO)) == {*SMALL, "LICENSE", "SHA256SUMS"}


def test_a_public_repository_wants_public_true(hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.make(REPO, private=False)
    assert "is public, and public=true is not given" in refused(tmp_path, ConfigError)
    pushed(tmp_path, SMALL, public=True)
    del hub.repositories[REPO]
    pushed(tmp_path, SMALL, public=True)
    assert not hub.repositories[REPO].private and "(not private)" in capsys.readouterr().out
    hub.make(REPO, private=True)
    pushed(tmp_path, SMALL, public=True)
    assert hub.repositories[REPO].private and "is private and stays so" in capsys.readouterr().err


def test_a_revision_is_a_branch_of_its_own(hub: Server, tmp_path: Path) -> None:
    for branch in ("at-1000", "at/2000", "at-1000"):
        pushed(tmp_path, {**SMALL, "n": branch.encode()}, branch=branch)
        assert hub.files(REPO, branch)["n"] == branch.encode()
    assert set(hub.files(REPO)) == set()
    assert len(hub.repositories[REPO].history) == 3


# --------------------------------------------------------------------------------------------------------------------
# Interrupted, slow and absent


@pytest.mark.parametrize("status", [429, 503, 0])
@pytest.mark.parametrize(
    "pattern", ["GET /api/models/", "repos/create", "tree/", "preupload", "objects/batch", "PUT /lfs", "/commit/"]
)
def test_what_fails_for_now_is_tried_again(hub: Server, tmp_path: Path, pattern: str, status: int) -> None:
    hub.faults.append(Fault(pattern, status, times=2 if status else 1))
    pushed(tmp_path, SMALL | LARGE)
    assert hub.faults[0].times == 0
    assert hub.repositories[REPO].history == ["initial commit", "a message"]
    assert set(hub.files(REPO)) == {*SMALL, *LARGE, "SHA256SUMS"}


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from servers.hub import _Handler

    made = _Handler._send

    def cut(self: _Handler, status: int, body: object, *more: str, **headers: str) -> None:
        if "/commit/" in self.path:
            monkeypatch.setattr(_Handler, "_send", made)
            self.close_connection = True
            self.connection.close()
            return
        made(self, status, body, *more, **headers)

    monkeypatch.setattr(_Handler, "_send", cut)
    pushed(tmp_path, SMALL | LARGE)
    assert hub.repositories[REPO].history == ["initial commit", "a message"]
    assert "nothing changed" in capsys.readouterr().out


def test_an_interrupted_push_commits_nothing_and_goes_on_with_the_rest(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Hub.upload
    count = 0

    def stopping(self: Hub, addition: object) -> None:
        nonlocal count
        count += 1
        if count == len(SMALL | LARGE) + 1:  # the last: SHA256SUMS is one, too
            raise KeyboardInterrupt
        sent(self, addition)

    monkeypatch.setattr(Hub, "upload", stopping)
    with pytest.raises(KeyboardInterrupt):
        pushed(tmp_path, SMALL | LARGE)
    assert hub.repositories[REPO].history == ["initial commit"]
    monkeypatch.setattr(Hub, "upload", sent)
    before = len(hub.said("^PUT"))
    assert before == 1
    pushed(tmp_path, SMALL | LARGE)
    digest = hashlib.sha256(LARGE["unet/weights.safetensors"]).hexdigest()
    assert len(hub.said(f"^PUT /lfs/{digest}")) == 1
    assert set(hub.files(REPO)) == {*SMALL, *LARGE, "SHA256SUMS"}


def test_a_commit_of_others_in_between_is_seen(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(tmp_path, SMALL)
    sent = Hub.commit

    def slow(self: Hub, *arguments: object) -> str:
        monkeypatch.setattr(Hub, "commit", sent)
        files = hub.repositories[REPO].branches["main"][1]
        hub.repositories[REPO].commit("main", {**files, "theirs": b"1", "README.md": b"theirs"}, "of others")
        return sent(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Hub, "commit", slow)
    pushed(tmp_path, {**SMALL, "README.md": b"ours", "unet/config.json": b"{2}"})
    files = hub.files(REPO)
    assert (files["theirs"], files["README.md"], files["unet/config.json"]) == (b"1", b"theirs", b"{2}")
    assert hub.repositories[REPO].history == ["initial commit", "a message", "of others", "a message"]


@pytest.mark.parametrize(
    ("pattern", "status", "kind", "words"),
    [
        ("GET /api/models/", 401, ConfigError, "does not take the token of HF_TOKEN (why): make another at http"),
        ("repos/create", 403, ConfigError, "may not create someone/model (why): make one with the right to write"),
        ("preupload", 403, ConfigError, "may not write someone/model"),
        ("/commit/", 404, StorageError, "has no such repository, branch or file"),
        ("/commit/", 409, StorageError, "others in the meantime (why): nothing was committed"),
        ("PUT /lfs", 403, ConfigError, "may not write someone/model"),
        ("PUT /lfs", 413, StorageError, "refuses the request with status 413"),
        ("/commit/", 402, StorageError, "refuses the request with status 402 (why)"),
        ("tree/", 503, StorageError, "answers 503 (why): nothing was committed to"),
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


def test_a_hub_that_is_not_there_is_told_before_any_work(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"cannot reach http://127\.0\.0\.1:1 .*the same command goes on"):
        look(Hub(REPO), public=False)


def test_metadata_that_the_hub_refuses_come_before_any_bytes_are_committed(hub: Server, tmp_path: Path) -> None:
    message = refused(tmp_path, ConfigError, {**LARGE, "README.md": b"---\nlicense: none-such\n---\n"})
    assert "refuses the metadata of README.md" in message and "must be one of mit, apache-2.0" in message
    assert hub.repositories[REPO].history == ["initial commit"]
    assert hub.said("^PUT") == []


# --------------------------------------------------------------------------------------------------------------------
# What is told


def test_the_token_comes_from_the_environment_alone_and_goes_over_https(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("", " "):
        monkeypatch.setenv("HF_TOKEN", name)
        with pytest.raises(ConfigError, match=r"HF_TOKEN is not set: make a token .*/settings/tokens"):
            Hub(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(ConfigError, match="over https:// alone"):
        Hub(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        Hub(REPO)
    assert hub.requests == []


def test_the_hub_is_told_the_clients_version_and_no_more(hub: Server, tmp_path: Path) -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_DISABLE_XET
    pushed(tmp_path, SMALL | LARGE)
    agents = {headers.get("User-Agent", headers.get("user-agent", "")) for line, headers in hub.requests}
    assert any("latentmill/" in agent for agent in agents)
    assert not [agent for agent in agents if "torch" in agent or "agent/" in agent]
    assert hub.said("telemetry|agent-harnesses|xet") == []
    assert before == (constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_DISABLE_XET)
