"""What benchmarks.gpu_whole brings along and installs where there is no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_whole
from benchmarks.whole import packages


def test_what_is_carried_is_pinned_and_what_is_needed_is_there() -> None:
    pins = packages.pinned(packages.CARRIED)
    assert len(set(pins)) == len(packages.CARRIED)
    assert any(pin.startswith("deepspeed==") for pin in pins)
    assert packages.missing() == []
    assert set(packages.CARRIED) <= set(packages.NEEDED.values()) | {"typing-extensions", "typing-inspection"}


def test_wheels_are_fetched_for_the_other_machine_and_built_where_there_are_none() -> None:
    download, build = packages.fetch_commands(Path(".whl"), "3.12")
    assert download[download.index("--python-version") + 1] == "3.12" and "--only-binary=:all:" in download
    assert any(word.startswith("pydantic_core==") for word in download)
    assert not any(word.startswith(("deepspeed", "torch==")) for word in download)
    assert [word.partition("==")[0] for word in build[-2:]] == ["antlr4-python3-runtime", "deepspeed"]


def test_wheels_that_lie_there_are_installed_without_a_network_where_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    (tmp_path / ".whl").mkdir()
    (tmp_path / ".whl" / "hjson-3.1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(packages, "REPOSITORY", tmp_path)
    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=lambda command, check: ran.append(command)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/before")
    assert packages.install(tmp_path / "site") == 0 and not ran, "all is there"
    monkeypatch.setattr(packages, "missing", lambda: ["hjson"])
    assert packages.install(tmp_path / "site") == 1
    assert "--no-index" in ran[0] and ran[0][-1].endswith("hjson-3.1.0-py3-none-any.whl")
    assert sys.path[1] == str(tmp_path / "site")
    assert packages.os.environ["PYTHONPATH"] == f"{tmp_path / 'site'}:/before"


def test_what_is_missing_is_named_before_anything_of_ours_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "install", lambda target: 0)
    monkeypatch.setattr(packages, "missing", lambda: ["deepspeed", "hydra-core"])
    assert gpu_whole.main(["device=cpu"]) == 1
    said = capsys.readouterr().err
    assert "deepspeed, hydra-core: not installed here; run it with --fetch where" in said and said.count("\n") == 1
    heavy = "[name for name in ('torch', 'yaml', 'pipeline') if name in sys.modules]"
    code = f"import sys; import benchmarks.gpu_whole; print({heavy})"
    ended: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_fetch_is_advised_for_what_it_fetches_alone() -> None:
    both = packages.advice(["hydra-core", "scipy"])
    assert "run it with --fetch for hydra-core where" in both and "install scipy yourself" in both
    assert "run it with --fetch" not in packages.advice(["scipy"])


def test_what_pip_cannot_do_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [[sys.executable, "-c", "raise SystemExit(2)"]]
    monkeypatch.setattr(packages, "fetch_commands", lambda folder, python: failing)
    monkeypatch.setattr(packages, "REPOSITORY", tmp_path)
    assert gpu_whole.main(["--fetch"]) == 1
    said = capsys.readouterr().err
    assert said == "benchmarks.gpu_whole: pip could not fetch the wheels (status 2); what it says stands above\n"
