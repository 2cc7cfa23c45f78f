"""Where `export` writes: it looks first, replaces its own files alone, and a kill at any place is mended by a rerun."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from made.limits import files_of_at_most, umask, wrong_modes
from made.run import make_cache, make_run
from pipeline import export
from pipeline.config import ExportConfig
from pipeline.errors import DestinationExists, StorageError
from pipeline.interchange.folder import FILES, MARKER, README, SUMS, Destination
from pipeline.interchange.readme import NOTES, is_readme, readme
from pipeline.interchange.single import is_export
from pipeline.models.weights import save_tensors
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage

MARK = '{"contract": {}, "weights": "ema", "n": 1}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("destination")
    make_cache(folder)
    make_run(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> ExportConfig:
    return ExportConfig(run=str(folder / "run"), dest=str(tmp_path / "sd"), check=False)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal must come before the run's weights are read."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("weights were loaded before the destination was looked at")

    monkeypatch.setattr(export, "load_trained", fail)


FEW = (MARKER, README, "unet/config.json", "text_encoder/config.json")


def made(where: Path, words: str, text_encoder: bool = True, keys: Iterable[str] = FILES) -> Path:
    """A small folder with the names of an export; every file holds `words`."""
    for key in keys:
        if text_encoder or not key.startswith(("text_encoder", "tokenizer")):
            (where / key).parent.mkdir(parents=True, exist_ok=True)
            (where / key).write_text(MARK if key == MARKER else f"{key} {words}")
    return where


def publish(where: Path, dest: Path | str, words: str, **parts: Any) -> None:
    Destination(open_storage(str(dest))).publish(made(where / words, words, **parts))


def texts(top: Path) -> dict[str, str]:
    return {path.relative_to(top).as_posix(): path.read_text() for path in top.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------------------
# What stays, what goes


def test_an_export_over_an_export_keeps_what_others_put_there(config: ExportConfig) -> None:
    dest = Path(config.dest)
    assert export.main(config) == 0
    (dest / README).write_text("My model card")
    for name in (".git/HEAD", "safety_checker/config.json", "samples.png"):
        (dest / name).parent.mkdir(exist_ok=True)
        (dest / name).write_text("mine")
    inode, before = dest.stat().st_ino, load_file(dest / "unet" / "diffusion_pytorch_model.safetensors")
    assert export.main(replace(config, weights="raw")) == 0
    assert dest.stat().st_ino == inode  # a mount point cannot be renamed
    after = load_file(dest / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], 2 * tensor) for name, tensor in before.items())  # of this run, see make_run
    assert (dest / README).read_text() == "My model card"
    assert [(dest / name).read_text() for name in (".git/HEAD", "samples.png")] == ["mine", "mine"]
    assert [path.name for path in dest.parent.iterdir()] == ["sd"]
    assert sorted(path.name for path in dest.iterdir() if path.name.startswith(".")) == [".git"]
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=dest, check=True)


def test_files_that_the_new_export_lacks_go_and_changed_ones_stay(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    publish(tmp_path, dest, "first")
    (dest / "tokenizer" / "vocab.json").write_text("mine")
    with pytest.raises(DestinationExists, match=r"tokenizer/vocab\.json is not as an export wrote it"):
        publish(tmp_path, dest, "second", text_encoder=False)
    (dest / "tokenizer" / "vocab.json").rename(dest / "tokenizer" / "mine.json")
    publish(tmp_path, dest, "third", text_encoder=False)
    assert not (dest / "text_encoder").exists()
    assert [path.name for path in (dest / "tokenizer").iterdir()] == ["mine.json"]
    assert (dest / "unet" / "config.json").read_text() == "unet/config.json third"


def test_an_edited_readme_stays_at_every_export_and_a_removed_one_is_written(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    publish(tmp_path, dest, "first")
    (dest / README).write_text("mine")
    for words in ("second", "third"):
        publish(tmp_path, dest, words)
        assert (dest / README).read_text() == "mine"
    (dest / README).unlink()
    publish(tmp_path, dest, "fourth")
    assert (dest / README).read_text() == f"{README} fourth"


def test_exports_without_a_list_of_hashes_are_taken_as_they_are_but_for_an_edited_readme(tmp_path: Path) -> None:
    text = readme("1", "ema=0.1", 1280, NOTES[0], trimmed=True, loop="FlowMatchHeunDiscreteScheduler")
    assert is_readme(text) and not is_readme(f"{text}\nMine.") and not is_readme("")
    for number, (there, expected) in enumerate([(text, f"{README} new"), (f"{text}Mine.", f"{text}Mine.")]):
        dest = made(tmp_path / f"dest{number}", "old")
        (dest / README).write_text(there)
        publish(tmp_path / str(number), dest, "new")
        assert (dest / README).read_text() == expected
        assert (dest / "vae" / "config.json").read_text() == "vae/config.json new"


def test_a_kill_at_any_place_is_mended_by_the_same_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the k-th change of the destination, for every k; into an empty one and over an earlier export."""
    done: list[str] = []
    last = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(self: LocalStorage, *arguments: Any) -> Any:
            done.append(arguments[0])
            if len(done) == last:
                raise KeyboardInterrupt
            return change(self, *arguments)

        return stopping

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for name in ("put", "put_file", "delete"):
        monkeypatch.setattr(LocalStorage, name, counted(getattr(LocalStorage, name)))
    for earlier in (False, True):
        for k in itertools.count(1):
            dest, where = tmp_path / f"{earlier}-{k}", tmp_path / f"made-{earlier}-{k}"
            last = 0
            if earlier:
                publish(where, dest, "first", keys=FEW)
                (dest / "mine.txt").write_text("mine")
            done.clear()
            last, ended = k, True
            try:
                publish(where, dest, "second", keys=FEW, text_encoder=False)
            except KeyboardInterrupt:
                ended = False
            last = 0
            publish(where, dest, "third", keys=FEW, text_encoder=False)
            found = texts(dest)
            assert found.pop("mine.txt", "") == ("mine" if earlier else "")
            assert {key: text for key, text in found.items() if key not in (SUMS, MARKER)} == {
                key: f"{key} third" for key in (README, "unet/config.json")
            }
            assert [line.split()[1] for line in found[SUMS].splitlines()] == [README, MARKER, "unet/config.json"]
            if ended:
                break
        assert k > 5


# --------------------------------------------------------------------------------------------------------------------
# What is no place


def test_what_is_no_place_for_a_folder_is_refused_before_any_work(
    config: ExportConfig, tmp_path: Path, no_work: None
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "weights.bin").write_text("mine")
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / MARKER).write_text("{}")
    ours = made(tmp_path / "ours", "old")
    for name, words in {
        "file": "is a file, and a folder is wanted",
        "file/below": "is a file, and a folder is wanted",
        "to-file": "is a file, and a folder is wanted",
        "nowhere": "is a link to a place that does not exist",
        "others": "is not empty and no earlier export",
        "marked": "is not empty and no earlier export",
    }.items():
        with pytest.raises(DestinationExists, match=words):
            export.main(replace(config, dest=str(tmp_path / name)))
    (ours / SUMS).write_text(f"{'0' * 64}  ../file\n")
    with pytest.raises(DestinationExists, match="SHA256SUMS is not what an export wrote"):
        export.main(replace(config, dest=str(ours)))
    (ours / SUMS).unlink()
    (ours / "unet" / "config.json").unlink()
    (ours / "unet" / "config.json").mkdir()
    with pytest.raises(DestinationExists, match=r"unet/config\.json is a folder"):
        export.main(replace(config, dest=str(ours)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told_before_any_work(config: ExportConfig, no_work: None) -> None:
    for fmt, name in (("diffusers", "sd"), ("compvis", "model.safetensors")):
        with pytest.raises(StorageError, match="cannot write /proc"):
            export.main(replace(config, format=fmt, dest=f"/proc/{name}"))  # type: ignore[arg-type]
    assert not Path(config.dest).exists()


def test_a_changed_configuration_or_anothers_file_in_the_way_is_refused_before_any_work(
    config: ExportConfig, tmp_path: Path, no_work: None
) -> None:
    dest = Path(config.dest)
    publish(tmp_path, dest, "first", text_encoder=False)
    (dest / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(DestinationExists, match=r"scheduler_config\.json is not as an export wrote it.*move it away"):
        export.main(config)
    (dest / "scheduler" / "scheduler_config.json").unlink()
    (dest / "text_encoder").mkdir()
    (dest / "text_encoder" / "model.safetensors").write_text("mine")
    with pytest.raises(DestinationExists, match=r"text_encoder/model\.safetensors is not as an export wrote it"):
        export.main(config)


def test_the_current_folder_and_a_link_to_a_folder_are_written_into(
    config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        publish(tmp_path / "a", tmp_path / "link", "words")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / MARKER).exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        assert export.main(replace(config, dest=".")) == 0
    assert (tmp_path / "here" / "model_index.json").exists()
    assert sorted(path.name for path in (tmp_path / "here").iterdir() if path.name.startswith(".")) == []


def test_a_bucket_keeps_what_others_put_there(s3: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/export")
    publish(tmp_path, storage.url, "first", keys=FEW)
    storage.put(README, b"mine")
    storage.put("samples.png", b"mine")
    publish(tmp_path, storage.url, "second", keys=FEW, text_encoder=False)
    assert (storage.get(README), storage.get("samples.png")) == (b"mine", b"mine")
    assert storage.get("unet/config.json") == b"unet/config.json second"
    assert not storage.exists("text_encoder/config.json")
    storage.put("vae/config.json", b"mine")
    with pytest.raises(DestinationExists, match=r"vae/config\.json is not as an export wrote it"):
        Destination(storage)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"latentmill": "{}"})
    torch.save({"state_dict": {}, "latentmill": "{}"}, tmp_path / "a.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    for name, ours in (("a.safetensors", True), ("a.ckpt", True), ("b.ckpt", False)):
        storage.put(name, (tmp_path / name).read_bytes())
        assert is_export(storage, name) is ours


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_one_file_replaces_an_earlier_one_alone(
    config: ExportConfig, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, format="compvis", dest=str(tmp_path / f"model{suffix}"))
    for _ in range(2):
        assert export.main(config) == 0
    monkeypatch.setattr(export, "load_trained", lambda *a: 1 / 0)
    for name, content in (("text", b"mine"), ("empty", b""), ("zip", b"PK\x05\x06" + bytes(18))):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(DestinationExists, match="exists and no export wrote it"):
            export.main(replace(config, dest=str(path)))
        assert path.read_bytes() == content
    save = save_file if suffix == ".safetensors" else torch.save
    save({"latent": torch.zeros(3)}, tmp_path / f"others{suffix}")
    with pytest.raises(DestinationExists, match="exists and no export wrote it"):
        export.main(replace(config, dest=str(tmp_path / f"others{suffix}")))
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DestinationExists, match="is a folder"):
        export.main(replace(config, dest=str(tmp_path / f"folder{suffix}")))
    with pytest.raises(DestinationExists, match="is a file, and a folder is wanted"):
        export.main(replace(config, dest=str(tmp_path / f"text{suffix}" / f"model{suffix}")))


# --------------------------------------------------------------------------------------------------------------------
# Modes and full disks


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_published_files_and_folders_have_the_modes_of_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        staged = made(tmp_path / "staged", "words")
        save_tensors({"a": torch.zeros(2)}, staged / "unet" / "diffusion_pytorch_model.safetensors")
        (staged / "vae" / "config.json").chmod(0o600)
        Destination(LocalStorage(tmp_path / "dest")).publish(staged)
    assert wrong_modes(tmp_path / "dest", mask) == {}
    assert (tmp_path / "dest").stat().st_mode & 0o777 == 0o777 & ~mask


def test_exports_have_the_modes_of_the_umask(config: ExportConfig, tmp_path: Path) -> None:
    with umask(0o027):
        assert export.main(config) == 0
        for name in ("model.safetensors", "model.ckpt"):
            assert export.main(replace(config, format="compvis", dest=str(tmp_path / name))) == 0
            assert wrong_modes(tmp_path / name, 0o027) == {}
    assert wrong_modes(Path(config.dest), 0o027) == {}


@pytest.mark.parametrize("name", ["sd", "model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("size", [0, 20_000])
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing(
    config: ExportConfig, tmp_path: Path, name: str, size: int
) -> None:
    (tmp_path / "in").mkdir()
    fmt: Any = "diffusers" if name == "sd" else "compvis"
    with files_of_at_most(size), pytest.raises(StorageError, match=r"cannot write \S+") as caught:
        export.main(replace(config, format=fmt, dest=str(tmp_path / "in" / "new" / name)))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "in").rglob("*")) in ([], [tmp_path / "in" / "new"])


def test_a_full_disk_leaves_the_earlier_export_whole(config: ExportConfig) -> None:
    assert export.main(config) == 0
    before = texts_of(Path(config.dest))
    with files_of_at_most(20_000), pytest.raises(StorageError):
        export.main(replace(config, weights="raw"))
    assert texts_of(Path(config.dest)) == before


def texts_of(top: Path) -> dict[str, bytes]:
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_a_killed_writers_staging_folder_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    from pipeline.storage.staging import is_empty, staging_folder

    storage = LocalStorage(tmp_path / "dest")
    (storage.root / f".latentmill-{'0' * 16}" / "unet").mkdir(parents=True)
    assert is_empty(storage)
    with staging_folder(storage) as mine, staging_folder(storage) as other:
        assert mine.is_dir() and other.is_dir() and is_empty(storage)
        assert len(list(storage.root.iterdir())) == 2
    assert not list(tmp_path.glob("dest/*"))
    shutil.rmtree(storage.root)
    with staging_folder(storage):
        pass
    assert not os.path.lexists(storage.root)  # what was new and is empty goes
