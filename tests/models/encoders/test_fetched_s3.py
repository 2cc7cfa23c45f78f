"""Encoders in buckets: downloaded once, by several processes at once, and each file verified. On a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from made.encoders import FILES, assert_same_encoders, fetch, make_sources, own, with_weights
from pipeline import config as c
from pipeline.config.loading.load import load
from pipeline.errors import WeightsError
from pipeline.models.encoders import fetched
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.fetched import part_folder
from pipeline.models.encoders.text import load_text
from pipeline.storage.urls import open_storage


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


def test_a_bucket_is_downloaded_once_and_each_file_proved(
    s3: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetched, "CHUNK_BYTES", 3_000_001)
    encoders, dest = own(sources), f"{s3}/e"
    fetch(encoders, dest)
    fetch(encoders, dest)
    loaded, storage = with_weights(encoders, dest), open_storage(dest)
    assert_same_encoders(encoders, loaded)
    kept = {key: storage.get(key) for key in FILES[1:]}
    for key in kept:
        storage.delete(key)
    assert_same_encoders(encoders, loaded)  # all of it from the cache
    for path in (tmp_path / "cache" / "latentmill" / "encoders").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"s3://.*text/open_clip_model\.safetensors is missing or damaged"):
        load_text(loaded)
    for key, data in kept.items():
        storage.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WeightsError, match=r"s3://.*vae/diffusion_pytorch_model\.safetensors.*another hash"):
        load_autoencoder(loaded)
    fetch(encoders, dest)  # finds what is damaged by reading it
    assert_same_encoders(encoders, loaded)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_download_at_once_do_not_spoil_each_other(s3: str, tmp_path: Path, locks: bool) -> None:
    """Also on a file system without locks. The process imports no PyTorch, so several start quickly."""
    fetch(load("fetch", ["dest=d"]).encoders, f"{s3}/e")
    program = f"""
import sys
from pipeline.config import EncodersConfig
from pipeline.models.encoders import fetched
fetched.CHUNK_BYTES = 500_000
if not {locks}:
    def without(*_):
        raise OSError("no locks here")
    fetched.fcntl.flock = without
print(fetched.part_folder(EncodersConfig(weights={f"{s3}/e"!r}), "vae"))
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    ends = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, ends
    (folder,) = {out.strip() for out, _ in ends}
    assert sum(err.count("downloading") for _, err in ends) == 2 or not locks  # each file once
    assert (
        load_autoencoder(c.EncodersConfig(vae=folder)).weights_sha256
        == load_autoencoder(c.EncodersConfig()).weights_sha256
    )
    assert sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock") == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_what_was_fetched_can_be_fetched_on_from_there(s3: str, sources: Path, tmp_path: Path) -> None:
    """From a bucket to a node's own disk."""
    encoders = own(sources)
    first = fetch(encoders, f"{s3}/e")
    second = fetch(with_weights(encoders, f"{s3}/e"), tmp_path / "e")
    assert second["vae"]["files"] == first["vae"]["files"]
    assert second["text"]["files"] == first["text"]["files"]
    assert part_folder(with_weights(encoders, tmp_path / "e"), "vae") == tmp_path / "e" / "vae"
