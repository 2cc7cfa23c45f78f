"""`push` against a stand-in for the hub: one commit or none, what is others' stays, and no more is told than needed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import pipeline
from made.hub import LARGE, REPO, SMALL, pushed, refused, serve
from pipeline.errors import ConfigError, DestinationExists
from pipeline.interchange.hub.client import Hub
from servers.hub import PART_BYTES, TOKEN
from servers.hub import Hub as Server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serve(monkeypatch)


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
    said = capsys.readouterr().err
    assert "README.md there is not as a push left it, so it stays: remove it there to have this one" in said
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
    (tmp_path / "again").mkdir()
    pushed(tmp_path / "again", {**SMALL, "README.md": b"another"})
    agents = {headers.get("User-Agent", headers.get("user-agent", "")) for line, headers in hub.requests}
    hub_version = version("huggingface_hub")
    assert agents == {f"latentmill/{pipeline.__version__}; hf_hub/{hub_version}; python/{platform.python_version()}"}
    assert len(hub.said("GET /someone/model/resolve")) > 0 and len(hub.said("^PUT")) > 2
    assert hub.said("telemetry|agent-harnesses|xet") == []
    assert before == (constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_DISABLE_XET)
