"""Finding the input shards of a finished dataset again: only where its manifest may lead, and each under its name."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest

from made.growing import _encoders, run, shard, two_folders  # noqa: F401
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.errors import SourceError
from pipeline.storage import patterns
from pipeline.storage.local import LocalStorage
from preprocess.units import sources
from preprocess.units.sources import find_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A folder with s/0.tar, s/1.tar and the dataset c of them, and its manifest."""
    root = tmp_path_factory.mktemp("made")
    for i in range(2):
        shard(root / f"s/{i}.tar", 10 * i)
    run(root / "s/*.tar", root / "c")
    return root, load_manifest(LocalStorage(root / "c"))


@pytest.mark.parametrize(
    "pattern",
    [
        "{1..3000000000}.tar",
        "{a,b}" * 24 + "/*.tar",
        "/**/*",
        "/etc/*",
        "~/*.tar",
        "../../**/*.tar",
        "s/../../*.tar",
        "s3://bucket-of-somebody/{0..9}.tar",
        "http://somewhere/*.tar",
        "x\x1b[31m/*.tar",
        "**/*.tar",
        "",
    ],
)
@pytest.mark.parametrize("dataset", ["c", "s3://mine/c"])
def test_a_strangers_manifest_leads_nowhere(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pattern: str, dataset: str
) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    real = sources.open_storage
    monkeypatch.setattr(sources, "open_storage", lambda url: opened.append(url) or real(url))  # type: ignore[func-returns-value]
    monkeypatch.setattr(LocalStorage, "list", None)
    monkeypatch.setattr(patterns, "expand", None)
    started = time.monotonic()
    with pytest.raises(SourceError, match="is not where the manifest says"):
        find_inputs(dataclasses.replace(made[1], sources=(pattern,) * 100), "", dataset)
    assert time.monotonic() - started < 1
    assert set(opened) <= {".", "x\x1b[31m"}


@pytest.mark.parametrize("name", ["../s/0.tar", "/etc/passwd", "s/../../x"])
def test_names_do_not_lead_out_of_a_folder(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(made[0])
    unit = dataclasses.replace(made[1].units[0], source=name)
    with pytest.raises(SourceError):
        find_inputs(dataclasses.replace(made[1], units=(unit, made[1].units[1]), sources=("s/*.tar",)), "", "c")


@pytest.mark.parametrize("pattern", ["s/*.tar", "s/{0,1}.tar", "./s/*.tar"])
def test_sources_are_found_in_the_folder_that_the_manifest_records(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(made[0])
    found = find_inputs(dataclasses.replace(made[1], sources=(pattern,)), "", "c")
    assert [os.path.abspath(shard.storage.locate(shard.key)) for shard in found.values()] == [
        str(made[0] / "s/0.tar"),
        str(made[0] / "s/1.tar"),
    ]


def test_the_sources_that_were_given_can_always_be_given_again(tmp_path: Path) -> None:
    a, b, both = two_folders(tmp_path / "x")
    run(a, tmp_path / "c")
    run(b, tmp_path / "c")
    manifest = load_manifest(LocalStorage(tmp_path / "c"))
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    for source in (both, str(tmp_path / "y/{a,b}/*.tar"), str(tmp_path / "{x/a,y/b}/*.tar")):
        found = find_inputs(manifest, source, "c")
        assert [shard.url[-11:] for shard in found.values()] == [
            *("a/00000.tar", "a/00001.tar", "b/00000.tar", "b/00001.tar"),
        ]
    for source, what in ((a, "it lacks b/00000.tar"), (str(tmp_path / "{x/a,x/b,y/b}/*.tar"), "is none of its shards")):
        with pytest.raises(SourceError, match=what):
            find_inputs(manifest, source, "c")
